"""What the command line prints and leaves behind when all is well."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from as_user import COMMAND, environment, run

from megatron_bit.config import config_from_dict, load_config

COMMANDS = ["prepare", "train", "generate", "convert", "data verify", "bench step", "config", "doctor", "demo"]
RECORD = {
    "step",
    "tokens",
    "loss",
    "nats_per_token_bound",
    "lr",
    "grad_norm",
    "skipped",
    "replaced",
    "seconds",
    "tokens_per_second",
}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str) -> None:
    outcome = run(*command.split(), "--help", timeout=20)
    assert outcome.code == 0
    assert not outcome.err
    for word in command.split() or [c.split()[0] for c in COMMANDS]:
        assert word in outcome.out


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["config"], ["train", "FILE", "--dry-run"], ["plan", "FILE", "--json"]]
)
def test_what_needs_no_torch_imports_none(words: list[str], base: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", COMMAND, *(str(base) if word == "FILE" else word for word in words)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "megatron_bit" in modules
    assert not modules & {"torch", "deepspeed", "megatron", "numpy", "webdataset", "tensorboard", "sentencepiece"}


def test_dry_run_prints_a_configuration_that_loads(base: Path, tmp_path: Path) -> None:
    outcome = run("train", str(base), "--dry-run", "--nproc", "2", "parallel.pp=2", "data.path=a b")
    assert outcome.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(outcome.out)
    assert load_config(printed) == load_config(base, ["parallel.pp=2", "data.path=a b"])
    assert "2 ranks = TP 1 x PP 2 x DP 1" in outcome.out
    assert not Path("runs").exists()


@pytest.mark.parametrize("world", [["parallel.pp=2", "--world-size", "4"], ["--world-size", "4", "parallel.pp=2"]])
def test_dry_run_as_json(base: Path, world: list[str]) -> None:
    outcome = run("train", str(base), "--dry-run", "--json", *world)
    plan = json.loads(outcome.out)
    assert config_from_dict(plan["config"]) == load_config(base, ["parallel.pp=2"])
    layout = plan["layout"]
    assert (layout["world_size"], layout["pp"], layout["dp"]) == (4, 2, 2)
    layers = [int(part.split()[0]) for c in layout["chunks"] for part in c["holds"].split(" + ") if "layers" in part]
    assert sum(layers) == 5
    assert layout["chunks"][0]["holds"].startswith("embedding")
    assert layout["chunks"][-1]["holds"].endswith("head")


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_from_beginning_to_end(train_args: Any, tmp_path: Path) -> None:
    """One process; stops at train.stop_at, and goes on when it is given the run folder."""
    folder = tmp_path / "run"
    logs = ["log.to=[tensorboard]", "evaluate.every=2", "evaluate.samples=6", "log.every=2"]
    first = run(*train_args(folder, "train.stop_at=3", *logs))
    assert (first.code, first.err) == (0, "")
    assert not (folder / "FINISHED").exists()
    second = run("train", str(folder), "train.stop_at=null")
    assert (second.code, second.err) == (0, "")
    assert "continuing" in second.out and "step 3" in second.out
    assert (folder / "FINISHED").exists()

    records = _records(folder / "log.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    assert all(r.keys() == RECORD for r in records)
    assert [r["tokens"] for r in records] == [8 * 36 * step for step in range(1, 6)]
    assert all(math.isfinite(r["loss"]) and r["tokens_per_second"] > 0 for r in records)
    validation = _records(folder / "validation.jsonl")
    assert [(r["step"], r["samples"]) for r in validation] == [(0, 6), (2, 6), (4, 6), (5, 6)]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    points = events.Scalars("train/loss")
    assert [p.step for p in points] == [r["tokens"] for r in records]
    assert [p.value for p in points] == pytest.approx([r["loss"] for r in records])

    starts = sorted((folder / "starts").iterdir())
    assert [p.name for p in starts] == ["0000.yaml", "0001.yaml"]
    assert load_config(starts[0]).train.stop_at == 3
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["stop_at"] is None

    index = json.loads((folder / "checkpoints" / "step-00000005" / "index.json").read_text())
    built = sum(math.prod(entry["shape"]) for entry in index.values())
    plan = json.loads(run("train", str(folder), "--dry-run", "--json").out)
    assert plan["parameters"]["total"] == built


def test_a_stop_that_is_behind_says_so(train_args: Any, forked: Any, tmp_path: Path) -> None:
    """The same command with train.stop_at does not go on: it has to say what does."""
    words = train_args(tmp_path / "run", "train.stop_at=1")
    first, second = forked(words), forked(words)
    assert first.code == second.code == 0
    assert "train.stop_at" in second.out


def test_a_run_with_a_name_like_a_setting_and_a_copy_beside_its_checkpoints(train_args: Any, tmp_path: Path) -> None:
    """It is continued by its name; the copy is not listed, not pruned and in nobody's way, and can be compared."""
    name, saves = tmp_path / "sweep" / "optim.lr=1e-3", ["checkpoint.every=1", "checkpoint.keep=1"]
    assert run(*train_args(name, "train.steps=2", *saves)).code == 0
    newest = name / "checkpoints" / "step-00000002"
    copy = Path(shutil.copytree(newest, newest.with_name("step-00000002-good")))
    meta = json.loads((copy / "meta.json").read_text())
    meta["config"]["data"]["path"] = "half a pair: \ud800"  # of a value that is no text
    (copy / "meta.json").write_text(json.dumps(meta))
    done = run("train", str(name), "train.steps=4")
    assert done.code == 0, done.err
    kept = ["step-00000002-good", "step-00000003", "step-00000004"]  # of step 3 a finite loss is known
    assert sorted(p.name for p in (name / "checkpoints").iterdir()) == kept
    listed = json.loads(run("checkpoint", "ls", str(name), "--json").out)
    assert [line["step"] for line in listed] == [3, 4]
    run("checkpoint", "diff", str(name), str(copy)).refused("step-00000002-good/meta.json is no valid JSON")
    meta["config"]["data"]["path"] = "a line\nand \x1b[2J"
    (copy / "meta.json").write_text(json.dumps(meta))
    different = run("checkpoint", "diff", str(name), str(copy))
    assert different.code == 1 and not different.err
    assert r"data.path: a line\nand \x1b[2J -> " in different.out or r" -> a line\nand \x1b[2J" in different.out
    run("checkpoint", "rm", str(copy), "--step", "2").refused("is no run folder, and --step is a checkpoint of one")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_diverges_has_an_exit_code_of_its_own(ranks: int, train_args: Any, tmp_path: Path) -> None:
    several = ["--nproc", "2", "train.micro_batch_size=4"] if ranks > 1 else []
    settings = (
        "train.steps=40",
        "optim.lr=1e20",
        "optim.warmup_steps=0",
        "checkpoint.initial=true",
        "checkpoint.every=5",
    )
    ended = run(*train_args(tmp_path / "run", *settings), *several)
    assert ended.code == 86, ended.err
    lines = [line for line in ended.err.splitlines() if "error" in line]
    assert len(lines) == 1 and "Traceback" not in ended.err
    assert "10 updates in a row were skipped" in lines[0] and "step-00000000" in lines[0]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000000"]
