"""Attempts of a submission: their record, and whether another one follows. Decides from files alone; job.sh asks SLURM.

    python -m mbit_launcher.attempts begin SUBMISSION ATTEMPT JOB NODES [TOKEN QUEUED]
        exit code 0: go, 3: nothing to do
    python -m mbit_launcher.attempts end SUBMISSION ATTEMPT STATUS STATE ASKED
        exit code 0: over, 1: over and failed, 85: once more

STATUS is srun's exit code, STATE the job's in squeue, ASKED 1 if SLURM (or STOP) asked the attempt to save and leave.
TOKEN is what the job was queued with, QUEUED its number as jobs.jsonl has it: 12, or 12_3 for task 3 of an array.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mbit_launcher import heartbeats
from mbit_launcher.failures import first_failure
from mbit_launcher.submission import Submission, append_line, read_lines, submissions
from megatron_bit.config import Config
from megatron_bit.errors import EXIT_PREEMPTED, UserError
from megatron_bit.run.checkpoints import newest_step

OVER, FAILED, NOTHING_TO_DO, AGAIN = 0, 1, 3, EXIT_PREEMPTED
BAD_NODES_IN_A_ROW = 3  # then it is the profile that asks too much, and not the nodes
FRUITLESS_IN_A_ROW = 5  # ended by SLURM before the first step: the limit is too short
HUNG, BAD_NODES = "hung", "bad_nodes"  # files in the attempt's log folder: what watch.py and preflight.py have found


@dataclass
class Attempt:
    attempt: str  # "JOB.RESTART"
    job: str
    nodes: str
    begin: float
    from_step: int
    end: float | None = None
    step: int | None = None  # the furthest that it got to
    outcome: str | None = None
    """finished, stop_at, stopped (STOP file), asked (time limit, preemption: saved), crashed, hung, preflight (a bad
    node), taken (SLURM had ended the job: scancel, or a node was lost), lost (it never said how it ended, or a rank did
    not answer the others)"""
    reason: str = ""
    again: bool = True  # whether another attempt follows

    @property
    def failed(self) -> bool:
        return self.outcome in ("crashed", "hung")


_SCHEMA = TypeAdapter(list[Attempt])


@dataclass(frozen=True)
class Facts:
    """What is known when an attempt has ended."""

    step: int
    finished: bool = False
    stop_at: bool = False  # train.stop_at is reached
    stop_file: bool = False
    taken: str = ""  # the job's state, if SLURM does not run it any more
    asked: bool = False
    hung: str = ""  # what the watchdog saw
    bad_nodes: str = ""  # what the preflight check found
    diverged: str = ""  # what the trainer says of itself (RUN/DIVERGED)
    rank_lost: str = ""  # the same (RUN/RANK_LOST): which ranks did not answer
    status: int = 0
    error: str = ""  # the first failing rank's own words


def decide(history: Sequence[Attempt], facts: Facts, max_restarts: int) -> tuple[str, str, bool]:
    """(outcome, reason, whether another attempt follows) of the attempt after `history`."""
    if facts.finished:
        return "finished", "all steps are done", False
    if facts.stop_file:
        return "stopped", f"a STOP file; saved at step {facts.step}" if facts.asked else "a STOP file", False
    if facts.diverged:  # the same data and settings would do it again
        return "diverged", facts.diverged, False
    if facts.stop_at:
        return "stop_at", f"step {facts.step} is train.stop_at", False
    if facts.taken:
        return "taken", f"SLURM ended it ({facts.taken}): scancel, or a lost node", True
    if facts.bad_nodes:
        outcome, reason = "preflight", facts.bad_nodes
    elif facts.hung:
        outcome, reason = "hung", facts.hung
    elif facts.rank_lost:  # a lost node shows so as well: says nothing of the step
        outcome, reason = "lost", f"after step {facts.step}: {facts.rank_lost}"
    elif facts.asked:
        outcome, reason = "asked", f"time limit or preemption; step {facts.step}"
    else:
        what = facts.error or f"the step ended with exit code {facts.status}, and no rank said why"
        outcome, reason = "crashed", f"after step {facts.step}: {what}"
    if outcome in ("crashed", "hung") and any(a.failed and a.step == facts.step for a in history):
        return outcome, f"{reason}; the second time after step {facts.step}, so not tried again", False
    row = FRUITLESS_IN_A_ROW - 1
    last = history[-row:]
    if outcome == "asked" and len(last) == row and all(a.outcome == "asked" and a.step == facts.step for a in last):
        return outcome, f"{reason}; no step done in {row + 1} attempts: is cluster.time too short?", False
    row = BAD_NODES_IN_A_ROW - 1
    if outcome == "preflight" and len(history) >= row and all(a.outcome == "preflight" for a in history[-row:]):
        return outcome, f"{reason}; {row + 1} times in a row: is the profile right?", False
    if len(history) >= max_restarts:
        return outcome, f"{reason}; max_restarts {max_restarts} reached", False
    return outcome, reason, True


def read(path: Path) -> list[Attempt]:
    """The attempts in attempts.jsonl, in order; one that was begun and not ended has no outcome."""
    found: dict[str, dict[str, Any]] = {}
    for record in read_lines(path):
        found.setdefault(str(record.get("attempt")), {}).update(record)
    try:
        return _SCHEMA.validate_python(list(found.values()))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{path} is damaged: {first['loc'][-1]} = {str(first.get('input'))[:60]!r}; remove the line, or resume the "
            "run with a new submission"
        ) from None


def begin(submission: Submission, attempt: str, job: str, nodes: str, token: str = "", queued: str = "") -> int:
    """Write down that an attempt begins, and how the one before has ended, if it could not say so itself."""
    if token and (why := _stray(submission, token, queued)):
        _say(f"nothing to do: {why}")
        return NOTHING_TO_DO
    history = read(submission.attempts)
    if history and history[-1].outcome is None:
        last = history[-1]
        step = _furthest(submission.run, last.attempt, last.from_step)
        _end(submission, last.attempt, step, "lost", f"a node was lost, or SLURM took it, at step {step}", True)
    profile, config = submission.profile(), submission.config()
    why = ""
    if finished(submission.run, config):
        why = "finished: all steps are done"
    elif (submission.run / "STOP").exists():
        why = f"{submission.run / 'STOP'} is there; `megatron-bit resume` removes it"
    elif history and not history[-1].again:
        why = f"ended for good: {history[-1].reason}"
    elif len(history) > profile.max_restarts:
        why = f"max_restarts {profile.max_restarts} reached"
    if why:
        _say(f"nothing to do: {why}")
        return NOTHING_TO_DO
    step = newest_step(submission.run / "checkpoints")
    append_line(submission.attempts, asdict(Attempt(attempt, job, nodes, time.time(), step)))
    _say(f"attempt {attempt} ({len(history)} before it) on {nodes}, from step {step}")
    return OVER


def _stray(submission: Submission, token: str, queued: str) -> str:
    """Why a job that was queued with a token is not wanted; "" if it is, and then jobs.jsonl has its number."""
    wanted = submission.job_of(token)
    if wanted is not None:
        return "" if wanted == queued else f"job {wanted} was queued for the same; SLURM's answer to one got lost"
    newer = submissions(submission.run)[-1]
    if token not in submission.unanswered() and newer.folder != submission.folder:
        return f"SLURM had not queued it when it was asked, and {newer.folder} took its place"
    submission.add_job(token, queued, told=False)
    return ""


def end(submission: Submission, attempt: str, status: int, state: str, asked: bool) -> int:
    """Write down how an attempt ended, and decide whether another one follows."""
    history = read(submission.attempts)
    this = next(a for a in history if a.attempt == attempt)
    run, config, logs = submission.run, submission.config(), submission.logs / attempt
    failure = first_failure(logs)
    stop_at = config.train.stop_at
    facts = Facts(
        step=_furthest(run, attempt, this.from_step),
        finished=finished(run, config),
        stop_at=stop_at is not None and newest_step(run / "checkpoints") >= stop_at,
        stop_file=(run / "STOP").exists(),
        taken="" if state == "RUNNING" else state or "no longer there",
        asked=asked,
        hung=words_of(logs / HUNG),
        bad_nodes=words_of(logs / BAD_NODES),
        diverged=_said(run / "DIVERGED", this.begin),
        rank_lost=_said(run / "RANK_LOST", this.begin),
        status=status,
        error=str(failure) if failure else "",
    )
    before = [a for a in history if a.attempt != attempt]
    outcome, reason, again = decide(before, facts, submission.profile().max_restarts)
    _end(submission, attempt, facts.step, outcome, reason, again)
    if again:
        return AGAIN
    return OVER if outcome in ("finished", "stopped", "stop_at") else FAILED


def _end(submission: Submission, attempt: str, step: int, outcome: str, reason: str, again: bool) -> None:
    record: dict[str, Any] = {"attempt": attempt, "end": time.time(), "step": step}
    append_line(submission.attempts, {**record, "outcome": outcome, "reason": reason, "again": again})
    _say(f"attempt {attempt}: {outcome}: {reason}")


def _said(path: Path, begin: float) -> str:
    """The text of a file that was written in an attempt; an earlier start may have left one."""
    return words_of(path) if path.exists() and path.stat().st_mtime >= begin else ""


def finished(run: Path, config: Config) -> bool:
    """Whether all steps of a run are done. A marker alone may be of an earlier, shorter training of the same folder."""
    return (run / "FINISHED").exists() and newest_step(run / "checkpoints") >= config.train.steps


def _furthest(run: Path, attempt: str, least: int) -> int:
    return max([least, *(beat.step for beat in heartbeats.read(run, attempt))])


def words_of(path: Path) -> str:
    """The text of a file in one line; "" if it is not there."""
    try:
        return " ".join(path.read_text(errors="replace").split())
    except OSError:
        return ""


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    what, folder, *words = sys.argv[1:]
    if what == "begin":
        sys.exit(begin(Submission(Path(folder)), *words))
    attempt, status, state, asked = words
    sys.exit(end(Submission(Path(folder)), attempt, int(status), state, asked == "1"))
