"""`megatron-bit logs`: what the job's script, its nodes and its ranks say, as one text, and the first error on top."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mbit_launcher import attempts, slurm
from mbit_launcher.failures import first_failure, rank_logs
from mbit_launcher.silence import Silent
from mbit_launcher.submission import Submission, newest
from megatron_bit.errors import UserError

_RED, _BOLD, _PLAIN = "\x1b[31m", "\x1b[1m", "\x1b[0m"
_ERROR = re.compile(r"\berror\b|Traceback|^\w*(Error|Exception)\b|Fatal|failed|CANCELLED|Killed", re.IGNORECASE)
_POLL_SECONDS = 1.0


def main(run: Path, follow: bool, lines: int, attempt: str | None) -> int:
    """Print the logs of an attempt (default: the newest), and go on with what comes if `follow`.

    Raises:
        UserError: the run was never submitted, or has no such attempt.
    """
    submission = newest(run)
    history = attempts.read(submission.attempts)
    if attempt is not None and attempt not in [a.attempt for a in history]:
        known = ", ".join(a.attempt for a in history[-8:]) or "none yet"
        raise UserError(f"run {run} has no attempt {attempt!r}; attempts of its newest submission: {known}")
    paint = _Paint(sys.stdout.isatty())
    chosen = attempt or (history[-1].attempt if history else None)
    if chosen is not None:
        failure = first_failure(submission.logs / chosen)
        ended = next(a for a in history if a.attempt == chosen).outcome
        if failure is not None and ended in ("crashed", "hung"):
            print(paint.head(f"first failure of attempt {chosen}: rank {failure.rank} on {failure.node}"))
            print(paint.error(failure.text.rstrip()))
    seen: dict[Path, int] = {}
    for name, path in _files(submission, chosen):
        text = _read(path, seen)
        shown = text.splitlines()[-lines:]
        if shown:
            print(paint.head(f"==> {name}: {path}"))
            for line in shown:
                print(paint.line(line))
    if follow:
        _follow(submission, attempt, seen, paint)
    return 0


def _follow(submission: Submission, attempt: str | None, seen: dict[Path, int], paint: _Paint) -> None:
    """Print lines as they come, each with the name of who says it, until the run has no job any more."""
    rests: dict[Path, str] = {}
    over = told = False
    while True:
        history = attempts.read(submission.attempts)
        chosen = attempt or (history[-1].attempt if history else None)
        for name, path in _files(submission, chosen):
            text = rests.pop(path, "") + _read(path, seen)
            *whole, rest = text.split("\n")
            if rest:
                rests[path] = rest
            for line in whole:
                print(f"{paint.head(name)} {paint.line(line)}", flush=True)
        if over:
            return
        try:
            over = not slurm.jobs(submission.jobs())  # and then look once more
        except Silent as silence:  # does not say that the run is over
            if not told:
                print(f"{silence.what}: following on", file=sys.stderr, flush=True)
            told = True
        else:
            told = False
        time.sleep(_POLL_SECONDS)


def _files(submission: Submission, attempt: str | None) -> Iterator[tuple[str, Path]]:
    """(who, file) of what an attempt writes, the job's script first."""
    jobs = submission.jobs()
    job = _job(submission, attempt) or (jobs[-1] if jobs else None)
    if job is not None:
        yield "job", submission.log_of(job)
    if attempt is None:
        return
    folder = submission.logs / attempt
    for path in sorted(folder.glob("node-*.log")):
        yield path.stem.removeprefix("node-"), path
    for rank, node, path in rank_logs(folder):
        yield f"rank {rank} {node}", path


def _job(submission: Submission, attempt: str | None) -> str | None:
    """The job, as jobs.jsonl names it, of an attempt: tasks of an array have numbers of their own besides 12_3."""
    jobs = submission.jobs()
    number = (attempt or "").partition(".")[0]
    return number if number in jobs else (jobs[-1] if jobs else None)


def _read(path: Path, seen: dict[Path, int]) -> str:
    """What is new in a file."""
    try:
        with open(path, "rb") as file:
            file.seek(seen.get(path, 0))
            data = file.read()
    except OSError:
        return ""
    seen[path] = seen.get(path, 0) + len(data)
    return data.decode(errors="replace")


class _Paint:
    """Colours on a terminal, nothing elsewhere."""

    def __init__(self, on: bool) -> None:
        self._on = on

    def head(self, text: str) -> str:
        return f"{_BOLD}{text}{_PLAIN}" if self._on else text

    def error(self, text: str) -> str:
        return f"{_RED}{text}{_PLAIN}" if self._on else text

    def line(self, text: str) -> str:
        return self.error(text) if _ERROR.search(text) else text
