"""Runs that no SLURM job trains, but a process that somebody has started: who, how far, and how to end it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mbit_launcher import heartbeats
from mbit_launcher.attempts import words_of
from mbit_launcher.submission import parse_lines
from megatron_bit.errors import UserError
from megatron_bit.run.lock import Holder, holder

SILENT_SECONDS = 600.0  # a rank on another machine that has not been heard for so long is taken for gone
_LINE_BYTES = 1024  # a record of a log has fewer
_FINAL = ("DIVERGED", "RANK_LOST")  # what a run says of itself at its end


def training(run: Path) -> Holder | None:
    """The process that trains a run now; None if none does, as far as it can be known from here."""
    held = holder(run)
    if held is None or held.alive is False:
        return None
    if held.alive is None and not _heard(run):
        return None
    return held


def _heard(run: Path) -> bool:
    beats = heartbeats.read(run)
    return any(not beat.ended and time.time() - beat.time < SILENT_SECONDS for beat in beats)


def state(run: Path) -> tuple[str, str, str]:
    """(state, host, reason) of a run that was never submitted."""
    held = training(run)
    if held is not None:
        return "running", held.host, f"process {held.pid}" + ("" if held.alive else f" on {held.host}, by its files")
    if (run / "FINISHED").exists():
        return "finished", "", ""
    for said in _last_words(run):
        return "failed", "", said
    beats = heartbeats.read(run)
    if not beats:
        return "not started", "", ""
    ended = all(beat.ended for beat in beats)
    return "stopped" if ended else "ended", "", f"`megatron-bit train {run}` goes on"


def _last_words(run: Path) -> list[str]:
    """What a run has said of its end by itself."""
    return [f"{name}: {words_of(run / name)[:500]}" for name in _FINAL if (run / name).exists()]


def ranks(run: Path) -> int:
    """With how many ranks the run was trained last; 1 where it is not known."""
    starts = [path.stat().st_mtime for path in (run / "starts").glob("*.yaml")]
    return max(1, sum(beat.time >= max(starts, default=0.0) for beat in heartbeats.read(run)))


def cancel(run: Path, now: bool) -> str:
    """Ask the process that trains a run to save and end, or kill it with `now`. Returns what was done.

    Raises UserError: it is on another machine, or is not ours to end.
    """
    held = training(run)
    if held is None:
        return f"{run}: no process trains it"
    if not held.alive:
        raise UserError(
            f"{run} is trained by process {held.pid} on {held.host}, which cannot be ended from here; call this there"
        )
    try:
        os.kill(held.pid, signal.SIGKILL if now else signal.SIGTERM)
    except ProcessLookupError:
        return f"{run}: no process trains it"
    except PermissionError:
        raise UserError(f"{run} is trained by process {held.pid}, which is another user's") from None
    done = "was killed" if now else "saves and ends after its step (--now does not wait for it)"
    return f"{run}: process {held.pid} {done}"


class Log:
    """What a run writes of its steps and validations, as lines that come."""

    def __init__(self, run: Path) -> None:
        self._run, self._seen, self.over = run, dict[Path, int](), False

    def last(self, lines: int) -> list[str]:
        """What it says of its end, if it has one, and its last lines."""
        for path in (self._run / "log.jsonl", self._run / "validation.jsonl"):
            self._seen[path] = _tail(path, lines * _LINE_BYTES)
        return _last_words(self._run) + list(_new(self._run, self._seen))[-lines:]

    def more(self) -> list[str]:
        """The lines that have come since; `over` says whether more can."""
        over = training(self._run) is None  # asked first: what it has written by then is read
        found = list(_new(self._run, self._seen))
        self.over = over
        return found


def _new(run: Path, seen: dict[Path, int]) -> Iterator[str]:
    """What has come to the log and the validations since, in the order of steps."""
    found = [(int(r.get("step", 0)), 0, _step(r)) for r in _records(run / "log.jsonl", seen)]
    found += [(int(r.get("step", 0)), 1, _validation(r)) for r in _records(run / "validation.jsonl", seen)]
    return (text for *_, text in sorted(found))


def _tail(path: Path, most: int) -> int:
    """Where the first whole line of a file's last `most` bytes begins: a long run's log is not read from its start."""
    try:
        with open(path, "rb") as file:
            begin = max(0, path.stat().st_size - most)
            file.seek(begin)
            return begin + (len(file.readline()) if begin else 0)
    except OSError:
        return 0


def _records(path: Path, seen: dict[Path, int]) -> list[dict[str, Any]]:
    """Whole lines alone: what is being written is for the next time."""
    try:
        with open(path, "rb") as file:
            file.seek(seen.get(path, 0))
            data = file.read()
    except OSError:
        return []
    whole = data[: data.rfind(b"\n") + 1]
    seen[path] = seen.get(path, 0) + len(whole)
    return [r for r in parse_lines(whole.splitlines()) if isinstance(r.get("step"), int)]


def _step(record: dict[str, Any]) -> str:
    shown = {key: record.get(key) for key in ("loss", "lr", "grad_norm", "tokens_per_second")}
    return f"step {record['step']}  " + "  ".join(f"{key} {_number(value)}" for key, value in shown.items())


def _validation(record: dict[str, Any]) -> str:
    value, error = record.get("nats_per_token_bound"), record.get("standard_error")
    return f"step {record['step']}  validation {_number(value)} +- {_number(error)} nats/token"


def _number(value: Any) -> str:
    try:
        return f"{value:.4g}" if isinstance(value, int | float) else "-"
    except OverflowError:  # an integer that no float holds
        return "-"
