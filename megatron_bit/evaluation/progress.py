"""How far a long part has come, on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

SECONDS = 30.0  # between two lines


class Progress:
    """Reports the steps of one part under a name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def over(self, items: Iterable[int], *, step: int, total: int) -> Iterator[int]:
        """The items, each of which stands for `step` of `total` pieces of work (the last one for what is left)."""
        if sys.stderr.isatty():
            yield from self._bar(items, step, total)
            return
        begin = last = time.monotonic()
        for done, item in enumerate(items):
            now, ready = time.monotonic(), done * step
            if ready and now - last > SECONDS:
                last = now
                left = (now - begin) / ready * (total - ready)
                print(f"{self.name}: {ready} of {total}, {left:.0f} s left", file=sys.stderr, flush=True)
            yield item

    def _bar(self, items: Iterable[int], step: int, total: int) -> Iterator[int]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn(self.name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(self.name, total=total)
            for item in items:
                yield item
                bars.advance(task, step)
