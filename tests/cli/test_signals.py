"""Signals and deaths: what a job that is told to go leaves behind, and where the next start goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from as_user import TORCHRUN, Running, run

from megatron_bit.run.checkpoints import complete

STEPS = 24
SETTINGS = (
    f"train.steps={STEPS}",
    "log.every=1",
    "checkpoint.every=5",
    "checkpoint.keep=100",
    "train.micro_batch_size=4",
)


def _saved(run_folder: Path) -> int:
    """Step of the newest complete checkpoint."""
    from megatron_bit.run.folder import newest_checkpoint

    return int(newest_checkpoint(run_folder).name.removeprefix("step-"))


def _log(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]


def _losses(run_folder: Path) -> list[float]:
    """Of every step, as it was computed last."""
    by_step = {record["step"]: record["loss"] for record in _log(run_folder)}
    assert sorted(by_step) == list(range(1, STEPS + 1))
    return [by_step[step] for step in sorted(by_step)]


def _same(a: Path, b: Path, tolerance: float = 0.0) -> None:
    assert _losses(a) == pytest.approx(_losses(b), abs=tolerance, rel=0)
    for state in ("param", "exp_avg", "exp_avg_sq"):
        folders = [path / "checkpoints" / f"step-{STEPS:08d}" for path in (a, b)]
        assert tiny_runs.worst(*(tiny_runs.read_state(folder, state) for folder in folders))[0] <= tolerance


def _stops_saved(running: Running, run_folder: Path, sent_at: int) -> int:
    """Assert that a run has saved after a signal at step `sent_at`; returns the step it goes on from."""
    assert running.end() == 85, "".join(running.lines)
    assert "Traceback" not in "".join(running.lines)
    step = _saved(run_folder)
    assert sent_at < step < STEPS
    assert _log(run_folder)[-1]["step"] == step  # nothing after the save
    assert not (run_folder / "FINISHED").exists()
    return step


def test_one_process(train_args: Any, forked: Any, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    first = Running(*train_args(cut, *SETTINGS))
    first.wait_for("step 3/")
    first.process.send_signal(signal.SIGTERM)
    step = _stops_saved(first, cut, 3)

    second = Running("train", str(cut))
    assert f"at step {step}" in second.wait_for(str(cut))
    second.wait_for(f"step {step + 2}/")
    second.process.send_signal(signal.SIGINT)
    _stops_saved(second, cut, step + 2)

    rest, undisturbed = forked(["train", str(cut)]), forked(train_args(whole, *SETTINGS))
    assert rest.code == undisturbed.code == 0, rest.err + undisturbed.err
    _same(cut, whole)


def test_two_ranks(train_args: Any, tmp_path: Path) -> None:
    """A signal to the parent, one to a single rank, the death of a rank; and torchrun gives what --nproc gives."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    undisturbed = run(*train_args(whole, *SETTINGS), command=TORCHRUN)
    assert undisturbed.code == 0, undisturbed.err

    job = Running(*train_args(cut, *SETTINGS), "--nproc", "2")
    job.wait_for("step 3/")
    job.process.send_signal(signal.SIGUSR1)
    step = _stops_saved(job, cut, 3)

    job = Running("train", str(cut), "--nproc", "2")
    assert f"at step {step}" in job.wait_for(str(cut))
    ranks = job.ranks()
    job.wait_for(f"step {step + 2}/")
    os.kill(ranks[1], signal.SIGUSR1)  # rank 1 alone
    step = _stops_saved(job, cut, step + 2)

    job = Running("train", str(cut), "--nproc", "2")
    assert f"at step {step}" in job.wait_for(str(cut))
    ranks = job.ranks()
    job.wait_for("saved ")
    os.kill(ranks[1], signal.SIGKILL)
    assert job.end() == 128 + signal.SIGKILL
    assert job.seconds < 30
    text = "".join(job.lines)
    assert "rank 1 of 2 was killed by SIGKILL" in text
    assert "Traceback" not in text, text  # of rank 0, which has done nothing wrong
    step = _saved(cut)
    newest = cut / "checkpoints" / f"step-{step:08d}"
    shutil.copytree(newest, newest.with_name("step-00000022.tmp"))  # killed before the rename
    shutil.copytree(newest, newest.with_name("step-00000023"))  # a copy that was not complete
    (newest.with_name("step-00000023") / "COMMITTED").unlink()

    last = run("train", str(cut), "--nproc", "2")
    assert last.code == 0, last.err
    assert f"at step {step}" in last.out
    assert (cut / "FINISHED").exists()
    # torchrun's ranks and --nproc's were bit-identical in 6 of 7 runs, and once 3e-8 apart from the start on (cause not
    # known); the bit-exact laws are in test_one_process and tests/resume
    _same(cut, whole, tolerance=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_folder_that_is_replaced(ranks: int, train_args: Any, tmp_path: Path) -> None:
    """The first job stops with one line and leaves the new one's folder alone; its state is a run of its own."""
    folder = tmp_path / "run"
    several = ["--nproc", "2"] if ranks > 1 else []
    settings = (*SETTINGS, "train.steps=100000", "checkpoint.keep=2", *several)
    first = Running(*train_args(folder, *settings))
    first.wait_for("step 8/")
    folder.rename(tmp_path / "away")
    second = Running(*train_args(folder, *settings))
    assert first.end() == 2, "".join(first.lines)
    (line,) = [line for line in first.lines if "error" in line]
    assert "run folder" in line and ("is gone" in line or "was replaced" in line) and "megatron-bit train" in line
    (beside,) = tmp_path.glob("run.left-*")
    assert str(beside) in line and "Traceback" not in "".join(first.lines)
    second.wait_for("step 12/")
    second.process.send_signal(signal.SIGTERM)
    assert second.end() == 85, "".join(second.lines)
    step = _saved(beside)
    again = run("train", str(beside), f"train.steps={step + 2}", *several)
    assert again.code == 0 and f"at step {step}" in again.out, again.err
    # a checkpoint of the first job in the second one's folder is not continued
    shutil.copytree(beside / "checkpoints" / f"step-{step + 2:08d}", folder / "checkpoints" / "step-00090000")
    run("train", str(folder)).refused("step-00090000 is of another run: run id is")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_stops_answering(victim: int, train_args: Any, tmp_path: Path) -> None:
    """One line that names it, within the time that was set and a little more, and the run goes on afterwards."""
    settings = (*SETTINGS, "train.steps=100000", "checkpoint.keep=2", "parallel.timeout_minutes=0.1")
    job = Running(*train_args(tmp_path / "run", *settings), "--nproc", "2")
    job.wait_for("step 6/")
    while not complete(tmp_path / "run" / "checkpoints"):  # on a busy machine a save takes longer than a step
        assert job.process.poll() is None, "".join(job.lines)
        time.sleep(0.05)
    os.kill(job.ranks()[victim], signal.SIGSTOP)
    assert job.end() == 87, "".join(job.lines)
    assert job.seconds < 6 + 30
    text = "".join(job.lines)
    assert "Traceback" not in text, text
    (line,) = [line for line in job.lines if "error" in line]
    assert f"rank {victim} on " in line and f"rank {1 - victim}" not in line and "timeout_minutes = 0.1" in line
    again = run("train", str(tmp_path / "run"), f"train.steps={_saved(tmp_path / 'run') + 2}", "--nproc", "2")
    assert again.code == 0, again.err


def test_before_the_first_step(train_args: Any, tmp_path: Path) -> None:
    """SLURM may take the nodes while ranks still import: nothing is lost, and the same command continues."""
    job = Running(*train_args(tmp_path / "run", *SETTINGS), "--nproc", "2")
    while len(ranks := job.ranks()) < 2 or not all(_listens(pid) for pid in ranks.values()):
        assert job.process.poll() is None
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 85, "".join(job.lines)
    assert not list((tmp_path / "run").rglob("COMMITTED"))


def _listens(pid: int) -> bool:
    """Whether a process has got as far as a handler for SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def test_a_rank_0_that_listens_and_does_not_answer(train_args: Any, tmp_path: Path) -> None:
    """torch's client of the store would wait for it without an end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        args = train_args(tmp_path / "run", *SETTINGS, "parallel.timeout_minutes=0.05")
        alone = run(*args, **place, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    assert alone.code == 87, alone.err
    (line,) = [line for line in alone.err.splitlines() if "error" in line]
    assert "rank 1" in line and "in 6 s" in line and place["MASTER_PORT"] in line
    assert "Traceback" not in alone.err
