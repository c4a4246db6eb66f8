"""How runs are doing: one table, from squeue, the run folders, and sacct where the cluster keeps accounts."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from mbit_launcher import attempts, heartbeats, here, slurm
from mbit_launcher.submission import Submission, submissions
from megatron_bit.errors import UserError
from megatron_bit.io.measured import json_of
from megatron_bit.io.strict_json import Count, parse
from megatron_bit.io.text import shown
from megatron_bit.run.checkpoints import complete, step_of
from megatron_bit.run.folder import resolve_file

_DEPTH = 3  # folders below the given one in which runs are looked for: a sweep is runs/NAME/key=value
_TAIL_BYTES = 64 * 1024
_PACE_STEPS = 50


@dataclass(frozen=True)
class _Step:
    """What is read of a record of log.jsonl."""

    step: Count
    tokens: Count
    loss: float | None  # None: it was no number
    tokens_per_second: float
    seconds: float


_STEP = TypeAdapter(_Step)


@dataclass
class Status:
    """One run. Times are in seconds; None is what is not known."""

    run: str
    job: str | None = None
    state: str | None = "not started"  # None: SLURM has not said, and the files do not settle it
    step: int = 0
    steps: int | None = None  # train.steps
    tokens: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    restarts: int = 0
    nodes: str = ""
    time_left: str | None = None  # of the job, as squeue writes it
    eta: float | None = None  # of the run, at the pace of the last steps
    checkpoint: int | None = None  # step of the newest complete one
    checkpoint_age: float | None = None
    reason: str = ""  # why it waits, and why the last attempt ended
    problem: str | None = None  # why the state is not known


def main(folders: Sequence[Path], as_json: bool) -> int:
    """Print the table of `megatron-bit status`; UserError if a folder is not there."""
    runs = [run for folder in folders for run in find(folder)]
    rows = collect(list(dict.fromkeys(runs)))
    unknown = [row for row in rows if row.state is None]
    if as_json:
        print(json_of([asdict(row) for row in rows], indent=1))
        return 0
    if unknown:  # one line above them, whatever the number of runs
        print(
            f"of {len(unknown)} of {len(rows)} runs the state is not known: {unknown[0].problem}",
            file=sys.stderr,
            flush=True,
        )
    if rows:
        print(table(rows), end="")
    else:
        print(f"no runs in {', '.join(map(str, folders))}")
    return 0


def find(folder: Path) -> list[Path]:
    """The run that a folder is, or those below it; UserError if it does not exist."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give run folders, or folders that hold them")
    return list(_runs(folder, _DEPTH))


def find_some(folder: Path) -> list[Path]:
    """The same, absolute; UserError if there is none."""
    found = find(folder.absolute())
    if not found:
        raise UserError(
            f"{folder} is no run and holds none; `megatron-bit submit CONFIG.yaml --cluster C.yaml` makes one"
        )
    return found


def _runs(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "identity.json").exists() or submissions(folder):
        yield folder
    elif depth:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                yield from _runs(path, depth - 1)


def collect(runs: Sequence[Path]) -> list[Status]:
    """What is known of each run; one call of squeue for all of them, and one for each whose number got lost."""
    made = {run: found[-1] for run in runs if (found := submissions(run))}
    ids = {run: submission.jobs() for run, submission in made.items()}
    live: dict[str, slurm.Job] = {}
    problem = ""
    try:
        for run, submission in made.items():
            asked = submission.unanswered()
            ids[run] += [submission.task_name(token, job) for token in asked for job in slurm.queued(token)]
        live = slurm.jobs(job for jobs in ids.values() for job in jobs)
    except UserError as error:  # no SLURM here, or it does not answer: the folders still say a lot
        problem = str(error)
    gone = [jobs[-1] for jobs in ids.values() if jobs and not any(job in live for job in jobs)]
    accounts = slurm.ended(gone) if not problem else {}
    return [_status(run, made.get(run), ids.get(run, []), live, accounts, problem) for run in runs]


def _status(
    run: Path,
    submission: Submission | None,
    ids: Sequence[str],
    live: dict[str, slurm.Job],
    accounts: dict[str, str],
    problem: str,
) -> Status:
    row = Status(run=str(run))
    done = complete(run / "checkpoints")
    if done:
        row.checkpoint, row.checkpoint_age = (
            step_of(done[-1].name),
            round(time.time() - (done[-1] / "COMMITTED").stat().st_mtime),
        )
    records = _tail(run / "log.jsonl")
    if records:
        last = records[-1]
        row.step, row.tokens, row.loss, row.tokens_per_second = (
            last.step,
            last.tokens,
            last.loss,
            last.tokens_per_second,
        )
    config = (submission.folder if submission else run) / "config.yaml"
    if config.exists():
        row.steps = resolve_file(config, ()).train.steps
    if submission is None:
        row.state, row.nodes, row.reason = here.state(run)
        if row.state == "running":
            row.eta = _eta(row, records)
        return row
    history = attempts.read(submission.attempts)
    row.restarts = max(0, len(history) - 1)
    job = next((live[i] for i in ids if i in live), None)
    row.job = job.id if job else (ids[-1] if ids else None)
    if history:
        beats = heartbeats.read(run, history[-1].attempt)
        row.step = max((beat.step for beat in beats), default=row.step)
        if job and job.state == "RUNNING" and history[-1].outcome is None:
            row.state = "running" if beats else "starting"
    ended = next((attempt for attempt in reversed(history) if attempt.outcome), None)
    reasons = [f"{ended.outcome}: {ended.reason}"] if ended else []
    if job is None and problem and (ended is None or ended.again) and (ids or submission.unanswered()):
        row.state, row.problem = None, problem
        if history and history[-1].outcome is None:
            reasons.insert(0, f"attempt {history[-1].attempt} goes on, by its files")
        reasons.insert(0, problem)
    elif job is None:
        row.state, why = _over(row, ended, accounts.get(row.job or "", ""), bool(history))
        reasons = [why] if why else reasons
    else:
        row.nodes, row.time_left = job.nodes, job.left
        if row.state not in ("running", "starting"):
            row.state = job.state.lower()
        if job.state == "PENDING":
            reasons.insert(0, f"waits for {job.reason}")
        if row.state == "running":
            row.eta = _eta(row, records)
    row.reason = "; ".join(reasons)
    return row


def _eta(row: Status, records: Sequence[_Step]) -> float | None:
    """Seconds to the last step, at the pace of the newest ones."""
    pace = [record.seconds for record in records[-_PACE_STEPS:]]
    return round(sum(pace) / len(pace) * max(0, row.steps - row.step)) if pace and row.steps else None


def _over(row: Status, ended: attempts.Attempt | None, account: str, begun: bool) -> tuple[str, str]:
    """(state, reason) of a run of which SLURM has no job any more."""
    states = {"finished": "finished", "stop_at": "stopped", "stopped": "stopped"}
    if ended is not None and not ended.again:
        return states.get(ended.outcome or "", "failed"), f"{ended.outcome}: {ended.reason}"
    if account:
        return account.split()[0].lower(), f"SLURM: {account}"
    how = "its job was cancelled or ended by SLURM" if begun else "its job has ended before it began"
    return "ended", f"{how}; `megatron-bit resume {row.run}` goes on"


def _tail(path: Path) -> list[_Step]:
    """The last records of a log; a line that is cut, or no record, is left out."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).split(b"\n")
    except OSError:
        return []
    records = []
    for line in lines:
        with contextlib.suppress(UserError):
            records.append(parse(line, _STEP, "", _TAIL_BYTES, ""))
    return records


_HEADS = (
    "run", "job", "state", "step", "tokens", "loss", "tokens/s", "restarts", "left", "ETA", "checkpoint", "reason",
)  # fmt: skip


def table(rows: Sequence[Status]) -> str:
    """The rows for a person; on a terminal the last column is cut to its width."""
    cells = [_HEADS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADS) - 1)]
    limit = shutil.get_terminal_size().columns if os.isatty(1) else None
    lines = ("  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[-1]]) for line in cells)
    return "".join(f"{line[:limit].rstrip()}\n" for line in lines)


def _cells(row: Status) -> tuple[str, ...]:
    here = f"{os.getcwd()}/"
    checkpoint = "-" if row.checkpoint is None else f"{row.checkpoint} ({duration(row.checkpoint_age or 0)} ago)"
    cells = (
        row.run.removeprefix(here),
        row.job or "-",
        row.state or "unknown",
        f"{row.step}/{row.steps}" if row.steps else str(row.step),
        count(row.tokens),
        "-" if row.loss is None else f"{row.loss:.4f}",
        count(row.tokens_per_second),
        str(row.restarts),
        row.time_left or "-",
        "-" if row.eta is None else duration(row.eta),
        checkpoint,
        row.reason.removeprefix(row.problem or "").removeprefix("; "),  # which stands above the table
    )
    return tuple(map(shown, cells))


def count(value: float | None) -> str:
    """1234567 as 1.23M."""
    if value is None:
        return "-"
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def duration(seconds: float) -> str:
    """3725 as 1:02:05, and days in front of it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hours}:{minutes:02d}:{rest:02d}"
