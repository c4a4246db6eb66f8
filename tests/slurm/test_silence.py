"""The controller is away (stopped, or killed and started again) at every stage of a job, and for every command.

One absence for all stages: what is to be seen in it is written down, and the tests look at that and at how runs end.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from mbit_launcher import minicluster
from on_cluster import COMMAND, MakeRun, Run, command, slurm

SILENCE = "SLURM does not answer"
AT_GATES = ("start", "step", "end", "crash", "preempted", "requeue")
PROFILE: dict[str, Any] = {"nodes": 1, "exclude": None, "save_seconds": 300, "sbatch": ["--comment=my own"]}
TIMES_OUT = "MessageTimeout=3\n"  # SLURM's commands give up after 10 s by default


@pytest.fixture(scope="module")
def own(cluster: Path) -> Iterator[Path]:
    """A cluster whose controller nobody else needs."""
    folder = Path(tempfile.mkdtemp(prefix="mc-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minicluster, "_CONF", minicluster._CONF + TIMES_OUT)
        patch.setenv("SLURM_CONF", str(minicluster.up(folder, nodes=3, cpus=16, with_parent=True)))
        yield folder
    minicluster.down(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _controller(folder: Path) -> psutil.Process:
    for process in psutil.process_iter():
        if process.name() == "slurmctld" and process.environ().get("SLURM_CONF") == str(folder / "slurm.conf"):
            return process
    raise AssertionError("no slurmctld")


def _stop(folder: Path) -> Callable[[], object]:
    process = _controller(folder)
    process.send_signal(signal.SIGSTOP)
    return lambda: process.send_signal(signal.SIGCONT)


def _kill(folder: Path) -> Callable[[], object]:
    time.sleep(6)  # it writes its state every 5 s
    minicluster.crash(folder, "slurmctld")
    return lambda: minicluster.boot(folder, "slurmctld")


@dataclass
class Command:
    """A command of ours that waits; `patience` in seconds."""

    words: list[str]
    patience: float
    out: str = ""
    code: int = -1
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        environment = {**os.environ, "MBIT_SLURM_PATIENCE": str(self.patience), "TERM": "dumb"}
        self.process = subprocess.Popen(
            [COMMAND, *self.words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def end(self) -> Command:
        self.out = self.process.communicate(timeout=150)[0]
        self.code = self.process.returncode
        return self


@dataclass
class Absence:
    runs: dict[str, Run]
    commands: dict[str, Command]
    status: list[dict[str, Any]]
    steps: int  # of the run that trains, done meanwhile


def _restarts(run: Run) -> int:
    (job,) = {attempt["job"] for attempt in run.all_attempts()}
    return int(slurm("squeue", "--noheader", "--states=all", f"--jobs={job}", "--Format=restartcnt").strip())


def _jobs_named(name: str) -> list[str]:
    return slurm("squeue", "--noheader", "--states=all", f"--name={name}", "--format=%i").split()


def _submit_words(run: Run) -> list[str]:
    run.submit("--dry-run")  # writes its files
    files = run.folder.parent / f"{run.folder.name}-files"
    return ["submit", str(files / "run.yaml"), "--cluster", str(files / "cluster.yaml"), f"run={run.folder}"]


@pytest.fixture(scope="module", params=[_stop, _kill])
def away(request: pytest.FixtureRequest, own: Path, stand_in: MakeRun) -> Absence:
    """Runs at every stage, an absence of the controller, and what commands said in it."""
    how = request.param.__name__.lstrip("_")

    def make(name: str, mode: str = "", gate: str = "", steps: int = 12) -> Run:
        run = stand_in(mode, steps, f"{name}-{how}", **PROFILE)
        run.profile["environment"]["STAND_IN_GATE"] = gate
        return run

    runs = {
        "start": make("start", gate="attempts begin"),
        "step": make("step", gate="preflight judge"),
        "training": make("training", steps=1000),
        "end": make("end", gate="step 9"),
        "crash": make("crash", "crash@9", gate="step 9"),
        "preempted": make("preempted", steps=60, gate="save"),
        "requeue": make("requeue", "crash@3", gate="attempts end"),
        "cancel": make("cancel", steps=1000),
    }
    for run in runs.values():
        run.submit()
    late = {name: make(name) for name in ("submit", "given-up")}
    words = {name: _submit_words(run) for name, run in late.items()}
    runs["preempted"].wait(lambda run: run.step() >= 3)
    (job,) = [line.split()[0] for line in runs["preempted"].live()]
    slurm("scancel", "--batch", "--signal=USR1", job)
    for name in ("training", "cancel"):
        runs[name].wait(lambda run: run.step() >= 3)
    for name in AT_GATES:
        runs[name].wait(lambda run: (run.folder / "at-gate").exists())

    back = request.param(own)
    try:
        for name in AT_GATES:
            (runs[name].folder / "go").touch()
        training, begun = runs["training"], runs["training"].step()
        commands = {
            "submit": Command(words["submit"], 100),
            "given-up": Command(words["given-up"], 0),
            "cancel": Command(["cancel", str(runs["cancel"].folder)], 0),
            "cancel --now": Command(["cancel", "--now", str(training.folder)], 0),
            "status": Command(["status", str(training.folder)], 0),
        }
        commands["given-up"].end()
        commands["again"] = Command(words["given-up"], 0)  # and still nobody knows
        status = Command(["status", "--json", str(training.folder), str(late["given-up"].folder)], 0).end()
        for name in ("again", "cancel", "cancel --now", "status"):
            commands[name].end()
        for name in AT_GATES:
            deadline = time.monotonic() + 60
            while SILENCE not in runs[name].log():
                assert time.monotonic() < deadline, runs[name].log()
                time.sleep(0.1)
        steps = training.step() - begun
    finally:
        back()
    commands["submit"].end()
    commands["found"] = Command(words["given-up"], 100).end()
    return Absence({**runs, **late}, commands, json.loads(status.out), steps)


def _said_once(run: Run) -> None:
    """What is waited for, once, and that it is over."""
    log = run.log()
    assert log.count(SILENCE) == log.count("SLURM answers again, after ") == 1, log


@pytest.mark.parametrize("stage", ["start", "step"])
def test_a_job_that_begins(away: Absence, stage: str) -> None:
    run = away.runs[stage]
    assert run.wait_until_over() == ["finished"], run.everything()
    _said_once(run)
    assert not (run.folder / "slurm" / "cordon").exists()  # it was no node's fault


def test_a_job_that_trains(away: Absence) -> None:
    run = away.runs["training"]
    assert away.steps > 10
    (line,) = away.commands["cancel --now"].out.splitlines()
    assert away.commands["cancel --now"].code == 2 and "is known to have ended; call it again" in line
    assert run.status()["state"] == "running" and SILENCE not in run.log()  # it has noticed nothing
    assert "saves and ends" in command("cancel", run.folder)
    assert run.wait_until_over() == ["stopped"], run.everything()


def test_a_job_that_ends(away: Absence) -> None:
    assert away.runs["end"].wait_until_over() == ["finished"], away.runs["end"].everything()
    _said_once(away.runs["end"])


def _comes_back_once(run: Run) -> None:
    assert run.wait_until_over() == ["crashed", "crashed"], run.everything()
    assert _restarts(run) == 1
    assert "does not requeue jobs" not in run.log()


def test_a_job_that_crashes_comes_back(away: Absence) -> None:
    _comes_back_once(away.runs["crash"])


def test_a_job_that_was_asked_to_save_comes_back(away: Absence) -> None:
    run = away.runs["preempted"]
    assert run.wait_until_over() == ["asked", "finished"], run.everything()
    first, second = run.attempts()
    assert second["from_step"] == first["step"] >= 3
    _said_once(run)


def test_a_job_is_requeued_once(away: Absence) -> None:
    """The one that was stopped does when it goes on, and nobody waits for its answer; the one killed has forgotten."""
    _comes_back_once(away.runs["requeue"])


def test_submit_waits_and_queues_one_job(away: Absence) -> None:
    run, done = away.runs["submit"], away.commands["submit"]
    (job,) = _jobs_named(run.folder.name)
    assert done.code == 0, done.out
    said, last = done.out.splitlines()
    assert said.startswith("sbatch has had no answer (") and said.endswith("asking again for up to 100 s")
    assert last == f"job {job}: {run.folder}"
    assert slurm("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%k").startswith("my own mbit-")
    assert run.wait_until_over() == ["finished"], run.everything()


def test_submit_gives_up_and_the_next_one_finds_the_job(away: Absence) -> None:
    run = away.runs["given-up"]
    for name, said in (("given-up", "whether the job is queued is not known"), ("again", "none was submitted")):
        (line,) = away.commands[name].out.splitlines()
        assert away.commands[name].code == 2
        assert line.startswith("megatron-bit: error: ") and said in line and "`scontrol ping`" in line, line
    (job,) = _jobs_named(run.folder.name)
    assert away.commands["found"].out.endswith(f"job {job}: {run.folder}\n")
    assert away.commands["found"].code == 0
    assert run.wait_until_over() == ["finished"], run.everything()


def test_status_knows_what_it_does_not_know(away: Absence) -> None:
    row, other = away.status
    assert row["state"] is None and row["time_left"] is None and row["step"] >= 3
    assert row["reason"].startswith("squeue has had no answer (") and "goes on, by its files" in row["reason"]
    assert other["state"] is None
    said, head, row = away.commands["status"].out.splitlines()
    assert away.commands["status"].code == 0
    assert head.split()[2] == "state" and row.split()[2] == "unknown" and "no answer" not in row
    assert said.startswith("of 1 of 1 runs the state is not known: squeue has had no answer (")


def test_cancel_claims_nothing(away: Absence) -> None:
    run, done = away.runs["cancel"], away.commands["cancel"]
    (line,) = done.out.splitlines()
    assert done.code == 2 and "nothing is cancelled, but" in line and f"{run.folder}/STOP is there now" in line
    assert run.wait_until_over() == ["stopped"], run.everything()
