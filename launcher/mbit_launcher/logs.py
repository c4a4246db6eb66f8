"""`megatron-bit logs`: what the job's script, its nodes and its ranks say, as one text, and the first error on top."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from mbit_launcher import attempts, here, slurm
from mbit_launcher.failures import first_failure, rank_logs
from mbit_launcher.silence import Silent
from mbit_launcher.submission import Submission, submissions
from megatron_bit.errors import UserError

_RED, _BOLD, _PLAIN = "\x1b[31m", "\x1b[1m", "\x1b[0m"
_ERROR = re.compile(r"\berror\b|Traceback|^\w*(Error|Exception)\b|Fatal|failed|CANCELLED|Killed", re.IGNORECASE)
_POLL_SECONDS = 1.0


def main(runs: Sequence[Path], follow: bool, lines: int, attempt: str | None) -> int:
    """Print the logs of an attempt of each run (default: the newest), and go on with what comes if `follow`.

    Raises:
        UserError: a run has no such attempt, or was never submitted and `attempt` is given.
    """
    if attempt is not None and len(runs) > 1:
        raise UserError(f"--attempt {attempt} is of one run, and here are {len(runs)}: give one of them, {runs[0]}")
    paint = _Paint(sys.stdout.isatty())
    logs = [_log(run, attempt, paint) for run in runs]
    for run, log in zip(runs, logs, strict=True):
        if len(runs) > 1:
            print(paint.head(f"==== {run}"))
        log.show(lines)
    while follow and not all(log.over for log in logs):
        for run, log in zip(runs, logs, strict=True):
            if not log.over:
                log.go_on(f"{run.name} " if len(runs) > 1 else "")
        time.sleep(_POLL_SECONDS)
    return 0


def _log(run: Path, attempt: str | None, paint: _Paint) -> _Submitted | _Here:
    made = submissions(run)
    if made:
        return _Submitted(run, made[-1], attempt, paint)
    if attempt is not None:
        raise UserError(f"run {run} was never submitted, so it has no attempt {attempt!r}; leave out --attempt")
    return _Here(run, paint)


class _Here:
    """The log of a run that no job of SLURM trains."""

    def __init__(self, run: Path, paint: _Paint) -> None:
        self._log, self._run, self._paint = here.Log(run), run, paint

    @property
    def over(self) -> bool:
        return self._log.over

    def show(self, lines: int) -> None:
        print(self._paint.head(f"==> steps: {self._run / 'log.jsonl'}"))
        self._print(self._log.last(lines), "")

    def go_on(self, name: str) -> None:
        self._print(self._log.more(), name)

    def _print(self, lines: Sequence[str], name: str) -> None:
        for line in lines:
            print(f"{self._paint.head(name)}{self._paint.line(line)}", flush=True)


class _Submitted:
    """The logs of the newest submission of a run."""

    def __init__(self, run: Path, submission: Submission, attempt: str | None, paint: _Paint) -> None:
        self._run, self._submission, self._attempt, self._paint = run, submission, attempt, paint
        self._seen: dict[Path, int] = {}
        self._rests: dict[Path, str] = {}
        self._told = self._last_look = self.over = False
        known = [a.attempt for a in attempts.read(submission.attempts)]
        if attempt is not None and attempt not in known:
            last = ", ".join(known[-8:]) or "none yet"
            raise UserError(f"run {run} has no attempt {attempt!r}; attempts of its newest submission: {last}")

    def show(self, lines: int) -> None:
        submission, paint = self._submission, self._paint
        history = attempts.read(submission.attempts)
        chosen = self._attempt or (history[-1].attempt if history else None)
        if chosen is not None:
            failure = first_failure(submission.logs / chosen)
            ended = next(a for a in history if a.attempt == chosen).outcome
            if failure is not None and ended in ("crashed", "hung"):
                print(paint.head(f"first failure of attempt {chosen}: rank {failure.rank} on {failure.node}"))
                print(paint.error(failure.text.rstrip()))
        for name, path in _files(submission, chosen):
            shown = _read(path, self._seen).splitlines()[-lines:]
            if shown:
                print(paint.head(f"==> {name}: {path}"))
                for line in shown:
                    print(paint.line(line))

    def go_on(self, run: str) -> None:
        """Print lines as they come, each with the name of who says it; `over` when the run has no job any more."""
        history = attempts.read(self._submission.attempts)
        chosen = self._attempt or (history[-1].attempt if history else None)
        for name, path in _files(self._submission, chosen):
            text = self._rests.pop(path, "") + _read(path, self._seen)
            *whole, rest = text.split("\n")
            if rest:
                self._rests[path] = rest
            for line in whole:
                print(f"{self._paint.head(run + name)} {self._paint.line(line)}", flush=True)
        if self._last_look:
            self.over = True
            return
        try:
            self._last_look = not slurm.jobs(self._submission.jobs())  # and then look once more
        except Silent as silence:  # does not say that the run is over
            if not self._told:
                print(f"{silence.what}: following on", file=sys.stderr, flush=True)
            self._told = True
        else:
            self._told = False


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
