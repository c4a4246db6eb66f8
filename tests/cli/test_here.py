"""Runs without SLURM, on this machine: seen, ended and continued by the commands that jobs have, wherever they lie."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from as_user import COMMAND, environment, run


def _row(folder: Path) -> dict[str, Any]:
    (row,) = json.loads(run("status", str(folder), "--json").out)
    return row


@pytest.mark.parametrize("now", [False, True])
def test_a_local_run_from_start_to_end(now: bool, train_args: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sweep" / "optim.lr=1e-3"
    words = train_args(folder, "train.steps=3000", "checkpoint.every=10", "--nproc", "2", "train.micro_batch_size=4")
    process = subprocess.Popen([sys.executable, COMMAND, *words], env=environment(), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoints" / "step-00000010").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        row = _row(folder)
        assert row["state"] == "running" and row["steps"] == 3000 and row["eta"] > 0
        assert "step 10  loss " in run("logs", str(folder)).out
        run("train", str(folder)).refused("is in use by process")
        ended = run("cancel", *(["--now"] if now else []), str(tmp_path / "sweep"))  # the folder above, as of a sweep
        assert ended.code == 0 and f"{folder}: process" in ended.out
        assert process.wait(timeout=60) == (137 if now else 85)
    finally:
        process.kill()
    row = _row(tmp_path / "sweep")
    assert row["state"] == ("ended" if now else "stopped") and f"`megatron-bit train {folder}` goes on" in row["reason"]
    saved = row["checkpoint"]
    assert now or saved == row["step"]
    assert run("cancel", str(folder)).out == f"{folder}: no process trains it\n"
    went_on = run("resume", str(folder), f"train.steps={saved + 2}", timeout=120)
    assert went_on.code == 0, went_on.err
    assert f"megatron-bit train {folder} --nproc 2" in went_on.out and f"at step {saved}" in went_on.out
    assert "DP=2" in went_on.out
    assert _row(folder)["state"] == "finished"
    run("logs", str(folder), "--attempt", "12.0").refused("was never submitted, so it has no attempt '12.0'")
    run("resume", str(folder), "cluster.nodes=2").refused("has no use without a cluster")
    run("cancel", str(tmp_path / "none")).refused("is not a folder")
    (tmp_path / "empty").mkdir()
    run("logs", str(tmp_path / "empty")).refused("is no run and holds none")


def test_a_run_lives_without_its_data_anywhere(
    train_args: Any, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, other = tmp_path / "data", tmp_path / "elsewhere"
    shutil.copytree(tiny_data, data)
    base = train_args(tmp_path / "unused")[1]
    monkeypatch.chdir(tmp_path)
    made = run("train", base, "run=run", "data.path=data", "train.steps=2")
    assert made.code == 0, made.err
    monkeypatch.chdir("/")  # its paths are absolute
    went_on = run("train", str(tmp_path / "run"), "train.steps=3")
    assert went_on.code == 0, went_on.err
    text = run("generate", str(tmp_path / "run"), "--prompt", "The", "--max-tokens", "6", "--json").out
    other.mkdir()
    shutil.move(tmp_path / "run", other / "run")
    shutil.move(data, other / "data")
    moved = str(other / "run")
    again = run("generate", moved, "--prompt", "The", "--max-tokens", "6", "--json").out
    assert json.loads(again)["text"] == json.loads(text)["text"]
    assert run("plan", moved, "--gpus-per-node", "1").code == 0
    assert run("convert", moved, str(other / "hf")).code == 0
    run("train", moved, "train.steps=4").refused(f"data folder {data} does not exist; if it has moved, say where")
    run("evaluate", moved, "--samples", "2").refused(f"data folder {data} does not exist; if it has moved, say where")
    measured = run("evaluate", moved, "--samples", "2", "--data", str(other / "data"), "--max-passes", "2", timeout=120)
    assert measured.code == 0 and "nats/token" in measured.out, measured.err
    assert run("train", moved, "train.steps=4", f"data.path={other / 'data'}").code == 0
