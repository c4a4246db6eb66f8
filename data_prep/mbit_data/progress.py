"""What `prepare` tells the user on stderr: a rich bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

LINE_SECONDS = 10.0  # between plain progress lines


class Advance(Protocol):
    def __call__(self, read_bytes: int, tokens: int) -> None: ...


class Reporter:
    """Silent if not enabled."""

    def __init__(self, enabled: bool):
        self._enabled = enabled

    def line(self, text: str) -> None:
        if self._enabled:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def bar(self, description: str, total_bytes: int) -> Iterator[Advance]:
        """Progress over bytes read from disk; the callable inside takes what was done since its last call."""
        if not self._enabled:
            yield lambda read_bytes, tokens: None
        elif sys.stderr.isatty():
            with _rich_bar(description, total_bytes) as advance:
                yield advance
        else:
            yield self._plain(description, total_bytes)

    @contextmanager
    def steps(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        """Progress over equal steps; the callable inside is called after each."""
        if not self._enabled:
            yield lambda: None
        elif sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, console=Console(stderr=True)) as progress:
                task = progress.add_task(description, total=total)
                yield lambda: progress.advance(task)
        else:
            yield self._plain_steps(description, total)

    def _plain_steps(self, description: str, total: int) -> Callable[[], None]:
        begin = last = time.monotonic()
        done = 0

        def step() -> None:
            nonlocal last, done
            done, now = done + 1, time.monotonic()
            if now - last >= LINE_SECONDS:
                last = now
                left = (total - done) * (now - begin) / done
                self.line(f"{description}: {done:,} of {total:,}, {left:.0f} s left")

        return step

    def _plain(self, description: str, total_bytes: int) -> Advance:
        begin = last = time.monotonic()
        done = made = 0

        def advance(read_bytes: int, tokens: int) -> None:
            nonlocal last, done, made
            done, made = done + read_bytes, made + tokens
            now = time.monotonic()
            if now - last >= LINE_SECONDS and done:
                last, rate = now, done / (now - begin)
                left = max(0, total_bytes - done) / rate
                self.line(
                    f"{description}: {done / 1e6:.0f} of {total_bytes / 1e6:.0f} MB, "
                    f"{f'{made / 1e6:.1f} M tokens, ' if made else ''}{rate / 1e6:.1f} MB/s, {left:.0f} s left"
                )

        return advance


@contextmanager
def _rich_bar(description: str, total_bytes: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[made]}"),
        TimeRemainingColumn(),
    )
    made = 0
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total_bytes, made="")

        def advance(read_bytes: int, tokens: int) -> None:
            nonlocal made
            made += tokens
            progress.update(task, advance=read_bytes, made=f"{made / 1e6:.1f} M tokens" if made else "")

        yield advance
