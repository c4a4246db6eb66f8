"""Runs on the tests' cluster, by the commands that a user types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
NODES = 17
STEPS, LONG = 24, 45  # of the real runs, and of the one that meets its time limit
COMMAND = str(Path(sys.executable).parent / "megatron-bit")


def command(*arguments: str | Path, code: int = 0, timeout: float = 120) -> str:
    """`megatron-bit ...`; what it printed, stderr included. Asserts its exit code."""
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
    done = subprocess.run(
        [COMMAND, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def slurm(*arguments: str) -> str:
    """A command of SLURM itself."""
    return subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=60).stdout


@dataclass
class Run:
    """A run folder and how to submit it."""

    folder: Path
    config: dict[str, Any]
    profile: dict[str, Any]
    settings: list[str] = field(default_factory=list)

    def submit(self, *more: str, verb: tuple[str, ...] = ("submit",), code: int = 0) -> str:
        files = self.folder.parent / f"{self.folder.name}-files"
        files.mkdir(parents=True, exist_ok=True)
        (files / "run.yaml").write_text(yaml.safe_dump(self.config))
        (files / "cluster.yaml").write_text(yaml.safe_dump(self.profile))
        words = [*verb, files / "run.yaml", "--cluster", files / "cluster.yaml", f"run={self.folder}", *self.settings]
        return command(*words, *more, code=code)

    def attempts(self) -> list[dict[str, Any]]:
        """Records of all attempts, folded as the launcher does, but for those that SLURM ended by mistake.

        When a scenario crashes a node, slurmctld may tell another job's srun of it, which then kills its own step
        ("Node n3 not part of this job step"); the launcher sees a crash without a reason, and tries again.
        """
        misled = "bad SRUN_NODE_FAIL message" in self.log()
        return [
            a
            for a in self.all_attempts()
            if not (misled and a["outcome"] == "crashed" and "no rank said why" in a["reason"])
        ]

    def all_attempts(self) -> list[dict[str, Any]]:
        from mbit_launcher.attempts import read

        return [vars(a) for path in sorted(self.folder.glob("slurm/*/attempts.jsonl")) for a in read(path)]

    def outcomes(self) -> list[str]:
        return [a["outcome"] for a in self.attempts()]

    def status(self) -> dict[str, Any]:
        (row,) = json.loads(command("status", self.folder, "--json"))
        return row

    def step(self) -> int:
        """The furthest step of the attempt that runs now; -1 before it has one."""
        from mbit_launcher import heartbeats

        attempts = self.all_attempts()
        if not attempts or attempts[-1]["outcome"] is not None:
            return -1
        return max((beat.step for beat in heartbeats.read(self.folder, attempts[-1]["attempt"])), default=-1)

    def wait(self, until: Callable[[Run], Any], timeout: float = 90) -> Any:
        """Poll until `until(self)` is true; its value. Asserts with all logs if that takes longer than `timeout`."""
        deadline = time.monotonic() + timeout
        while not (value := until(self)):
            assert time.monotonic() < deadline, f"waited for {timeout} s\n{self.everything()}"
            time.sleep(0.1)
        return value

    def wait_until_over(self, timeout: float = 120) -> list[str]:
        """Until no attempt follows and SLURM has no job of it any more; the outcomes of all attempts."""
        self.wait(lambda run: (a := run.all_attempts()) and a[-1]["outcome"] and not a[-1]["again"], timeout)
        self.wait(lambda run: not run.live(), timeout)
        return self.outcomes()

    def live(self) -> list[str]:
        """Its jobs that SLURM still has."""
        from mbit_launcher.submission import submissions

        ids = [job for submission in submissions(self.folder) for job in submission.jobs()]
        found = slurm("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return [line for line in found if line.split()[0] in ids]

    def nodes(self) -> list[str]:
        """Of the newest attempt."""
        return self.attempts()[-1]["nodes"].split(",")

    def log(self) -> str:
        """What the scripts of its jobs have said."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("slurm/*/logs/job-*.log")))

    def everything(self) -> str:
        logs = sorted(self.folder.glob("slurm/*/logs/**/*.log"), key=lambda path: path.stat().st_mtime)
        queue = slurm("squeue")
        return queue + "".join(f"==> {path}\n{path.read_text(errors='replace')[-3000:]}\n" for path in logs)


def all_but(*nodes: str) -> str:
    """For `exclude`: a run on these nodes alone."""
    return ",".join(f"n{i}" for i in range(1, NODES + 1) if f"n{i}" not in nodes)


MakeRun = Callable[..., Run]


@dataclass
class Stage:
    """What a scenario plays on."""

    cluster: Path
    stand_in: MakeRun
    real: MakeRun


Scenario = Callable[[Stage], None]
# Most of a scenario is waiting for SLURM, so they run at the same time, each in a thread; a test is the end of one.
CHEAP: dict[str, Scenario] = {}  # stand-in trainers: four at a time
DEAR: dict[str, Scenario] = {}  # real ones: two at a time
BACKGROUND: dict[str, Scenario] = {}  # a real one that has all the time of the others


def cheap(function: Scenario) -> Scenario:
    CHEAP[function.__name__] = function
    return function


def dear(function: Scenario) -> Scenario:
    DEAR[function.__name__] = function
    return function


def background(function: Scenario) -> Scenario:
    BACKGROUND[function.__name__] = function
    return function
