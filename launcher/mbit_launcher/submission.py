"""What one `submit` leaves in the run folder, and where: everything that the job needs, and what it was made from.

RUN/slurm/0000/            the first submission, then 0001 ...
    job.sbatch             what was submitted
    config.yaml            the resolved configuration: the one file that the job gets
    cluster.yaml           the resolved profile
    code.json, code.diff   version, git commit, and what was changed since that commit
    jobs.jsonl             the jobs, each by the token that sbatch got, before and after: {"token": "mbit-1f...",
                           "time": ...}, {"token": "mbit-1f...", "job": "12", "time": ..., "log": ...}
    attempts.jsonl         how each attempt of the jobs began and ended (attempts.py)
    logs/job-12.log        what job.sbatch says
    logs/12.0/             attempt 0 of job 12: nodes and ranks
RUN/slurm/cordon           nodes that failed a check, unless the profile names another file
RUN/STOP                   made by you, or by `cancel`: save and end for good
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mbit_launcher.profile import ClusterProfile, load_profile
from megatron_bit import __version__
from megatron_bit.config import Config, load_config, to_yaml
from megatron_bit.errors import UserError
from megatron_bit.io import trust
from megatron_bit.io.files import write_atomic

TOKEN = r"mbit-[0-9a-f]{16}"


def new_token() -> str:
    """A word that no other job has, by which one is found whose number got lost."""
    return f"mbit-{secrets.token_hex(8)}"


class Submission:
    """The folder of one submission."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def run(self) -> Path:
        return self.folder.parents[1]

    @property
    def script(self) -> Path:
        return self.folder / "job.sbatch"

    @property
    def attempts(self) -> Path:
        return self.folder / "attempts.jsonl"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def config(self) -> Config:
        return load_config(self.folder / "config.yaml")

    def profile(self) -> ClusterProfile:
        return load_profile(self.folder / "cluster.yaml")

    def same(self, config: Config, profile: ClusterProfile) -> bool:
        """Whether `create` would write the same configuration and profile now."""
        try:
            mine = [(self.folder / name).read_text(encoding="utf-8") for name in ("config.yaml", "cluster.yaml")]
        except OSError:
            return False
        return mine == [to_yaml(config), _profile_text(profile)]

    def check_profile(self) -> None:
        """UserError if the profile is not as this user has submitted it: it names programs that a job runs."""
        if not trust.known(self._profile_words()):
            raise UserError(
                f"{self.folder / 'cluster.yaml'} was not submitted by you from here, or has changed since, and it says "
                "what a job runs; look at it, and give it yourself: --cluster " + str(self.folder / "cluster.yaml")
            )

    def remember_profile(self) -> None:
        trust.remember(self._profile_words())

    def _profile_words(self) -> str:
        return (self.folder / "cluster.yaml").read_text(encoding="utf-8")

    def cordon(self, profile: ClusterProfile) -> Path:
        return Path(profile.cordon) if profile.cordon else self.run / "slurm" / "cordon"

    def jobs(self) -> list[str]:
        """Numbers of its jobs, in the order in which they run."""
        records = read_lines(self.folder / "jobs.jsonl")
        # a job whose answer was late is written down by two: who asked for it, and the job itself
        found = list(dict.fromkeys(str(record.get("job")) for record in records if not _asked_only(record)))
        for job in found:
            if not re.fullmatch(r"\d{1,12}(_\d{1,12})?", job):  # it becomes a word of squeue and scancel
                raise UserError(f"{self.folder / 'jobs.jsonl'} names a job {job[:40]!r}, which is no number of SLURM's")
        return found

    def log_of(self, job: str) -> Path:
        """What the script of a job says."""
        for record in read_lines(self.folder / "jobs.jsonl"):
            log = Path(str(record.get("log")))
            # of a sweep it is with the first of its runs, and wherever it says, the log of a job
            if record.get("job") == job and re.fullmatch(r"job-[\w.-]+\.log", log.name) and log.parent.name == "logs":
                return log
        return self.logs / f"job-{job}.log"

    def ask_job(self, token: str, logs: Path, task: int | None = None) -> None:
        """Write down that a job is about to be asked for: should the answer get lost, `unanswered` knows of it.

        Args:
            logs: folder of what the job's script will say.
            task: of a job array, the one that is this submission's.
        """
        record = {"token": token, "time": time.time(), "logs": str(logs), "task": task}
        append_line(self.folder / "jobs.jsonl", record)

    def add_job(self, token: str, job: str, told: bool = True) -> str:
        """Write down the number that SLURM gave what was asked for with a token; returns it with the array's task.

        Args:
            told: who asked for it hears of it, too; False when the job itself says so.
        """
        name = self.task_name(token, job)
        log = Path(str(self._asked(token)["logs"])) / f"job-{name}.log"
        record = {"token": token, "job": name, "time": time.time(), "log": str(log), "told": told}
        append_line(self.folder / "jobs.jsonl", record)
        return name

    def task_name(self, token: str, job: str) -> str:
        """The job of this submission alone, where SLURM has given the number of a whole array."""
        task = self._asked(token)["task"]
        return job if task is None or "_" in job else f"{job}_{task}"

    def drop_job(self, token: str, why: str) -> None:
        """Write down that what was asked for with a token was not queued."""
        append_line(self.folder / "jobs.jsonl", {"token": token, "dropped": why, "time": time.time()})

    def unanswered(self) -> list[str]:
        """Tokens of which it is not known whether SLURM has queued their job."""
        return self._tokens(lambda record: not _asked_only(record) or "dropped" in record)

    def untold(self) -> list[str]:
        """Those, and tokens of jobs of which nobody but the job itself has written down that they were queued."""
        return self._tokens(lambda record: bool(record.get("told")) or "dropped" in record)

    def job_of(self, token: str) -> str | None:
        """The job that was queued with a token, as far as it is known."""
        records = read_lines(self.folder / "jobs.jsonl")
        return next((str(r["job"]) for r in records if r.get("token") == token and "job" in r), None)

    def _asked(self, token: str) -> dict[str, Any]:
        records = read_lines(self.folder / "jobs.jsonl")
        found = next((r for r in records if r.get("token") == token and "logs" in r), {})
        return {"logs": self.logs, "task": None, **found}

    def _tokens(self, settled: Callable[[dict[str, Any]], bool]) -> list[str]:
        """Tokens without a record that settles them, oldest first."""
        records = read_lines(self.folder / "jobs.jsonl")
        over = {record.get("token") for record in records if settled(record)}
        found = dict.fromkeys(str(record["token"]) for record in records if "token" in record)
        return [token for token in found if token not in over and re.fullmatch(TOKEN, token)]


def submissions(run: Path) -> list[Submission]:
    """Of a run, oldest first."""
    folders = {path.parent for path in (run / "slurm").glob("*/config.yaml") if path.parent.name.isdecimal()}
    return [Submission(folder) for folder in sorted(folders, key=lambda folder: int(folder.name))]


def newest(run: Path) -> Submission:
    """The newest submission of a run; UserError if it has none."""
    found = submissions(run)
    if not found:
        what = "was never submitted" if run.is_dir() else "does not exist"
        raise UserError(f"run folder {run} {what}; `megatron-bit submit CONFIG.yaml --cluster CLUSTER.yaml run={run}`")
    return found[-1]


def create(config: Config, profile: ClusterProfile) -> Submission:
    """A new folder with configuration, profile and the state of the code; the script is still to come.

    Raises:
        UserError: the folder cannot be written.
    """
    root = Path(config.run) / "slurm"
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        number = max((int(p.name) for p in root.iterdir() if p.name.isdigit()), default=-1) + 1
        folder = root / f"{number:04d}"
        (folder / "logs").mkdir(parents=True)
        code, diff = code_state()
        write_atomic(folder / "code.json", json.dumps(code, indent=1).encode())
        write_atomic(folder / "code.diff", diff.encode())
        write_atomic(folder / "cluster.yaml", _profile_text(profile).encode())
        write_atomic(folder / "config.yaml", to_yaml(config).encode())
    made = Submission(folder)
    made.remember_profile()
    trust.remember(*filter(trust.acts, (*config.data.folders, config.checkpoint.mirror)))
    return made


def _profile_text(profile: ClusterProfile) -> str:
    return yaml.safe_dump(profile.model_dump(mode="json", exclude_none=True), sort_keys=False)


def _asked_only(record: dict[str, Any]) -> bool:
    """Whether a record of jobs.jsonl is of no job yet."""
    return "token" in record and "job" not in record


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """UserError for what the disk says."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.EDQUOT, errno.ENOSPC)
        advice = "make room (`megatron-bit checkpoint rm`), or choose another run=... folder"
        raise UserError(
            f"run folder {folder.parent} cannot be written: {error.strerror} ({error.filename or folder})"
            + (f"; {advice}" if full else "")
        ) from None


def code_state() -> tuple[dict[str, Any], str]:
    """(version, commit, whether files were changed; the diff against that commit) of the code that submits."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments],
                capture_output=True, check=False, timeout=30, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.decode(errors="replace") if done.returncode == 0 else None

    state: dict[str, Any] = {"version": __version__, "code": str(root), "commit": None}
    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()) != root:  # installed from a wheel, perhaps below somebody else's repository
        return state, ""
    untracked = (git("ls-files", "--others", "--exclude-standard") or "").splitlines()
    diff = git("diff", "--binary", "HEAD") or ""
    state |= {"commit": (git("rev-parse", "HEAD") or "").strip(), "changed": bool(diff), "untracked": untracked[:100]}
    return state, diff


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; none if it is not there. A last line that is cut is left out."""
    try:
        return parse_lines(path.read_text(encoding="utf-8").split("\n"))
    except OSError:
        return []


def parse_lines(lines: Iterable[str | bytes]) -> list[dict[str, Any]]:
    """Those that are JSON objects."""
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add a record, on the disk when this returns. Raises OSError."""
    with open(path, "a+b") as file:
        if file.tell() and path.read_bytes()[-1:] != b"\n":  # a crash has cut the line before
            file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
