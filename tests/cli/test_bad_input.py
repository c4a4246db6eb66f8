"""A mistake of the user: exit code 2 and one line that says what, where and what to do."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from as_user import TORCHRUN, run

from megatron_bit.run.checkpoints import complete, step_of

# name -> (arguments after the YAML file, what the line has to say). All of them are found before torch is imported.
CONFIGURATION: dict[str, tuple[list[str], list[str]]] = {
    "pair_behind_an_option": (["parallel.pp=3", "--nproc", "2", "parallel.tp=3"], ["parallel.tp 3", "parallel.pp 3"]),
    "tp": (["--nproc", "2", "parallel.tp=3"], ["parallel.tp 3", "world size 2", "tp=2 pp=1"]),
    "pp": (["parallel.pp=2"], ["parallel.pp 2", "world size 1", "start 2 ranks"]),
    "heads": (["--nproc", "3", "parallel.tp=3"], ["model.num_heads 4", "parallel.tp 3", "[1, 2, 4]"]),
    "kv_heads": (
        ["--nproc", "4", "parallel.tp=4", "model.num_kv_heads=2"],
        ["model.num_kv_heads 2", "parallel.tp 4", "[1, 2]"],
    ),
    "kv_heads_divide": (["model.num_kv_heads=3"], ["num_heads 4", "num_kv_heads 3"]),
    "blocks": (["data.seq_length=37"], ["data.seq_length 37", "model.block_size 3", "36 or 39"]),
    "sequence_parallel": (
        ["--nproc", "2", "parallel.tp=2", "data.seq_length=39"],
        ["data.seq_length 39", "multiple of", "6", "parallel.sequence_parallel=false"],
    ),
    "global_batch": (
        ["--nproc", "3"],
        ["train.global_batch_size 8", "train.micro_batch_size 1", "data-parallel size 3", "9"],
    ),
    "micro_batch": (["train.micro_batch_size=3"], ["train.global_batch_size 8", "train.micro_batch_size 3"]),
    "interleaved": (
        ["--nproc", "2", "parallel.pp=2", "parallel.vpp=2", "train.global_batch_size=3"],
        ["parallel.pp 2", "3", "vpp=1"],
    ),
    "vpp": (["parallel.vpp=2"], ["vpp 2", "pp > 1"]),
    "zero": (["--nproc", "2", "parallel.pp=2", "parallel.zero_stage=2"], ["zero_stage 2", "pp 2", "zero_stage=1"]),
    "layers": (["--nproc", "8", "parallel.pp=8"], ["model.num_layers 5", "parallel.pp 8", "at most 6"]),
    "softmax": (["model.head.kind=softmax"], ["head.kind softmax", "model.block_size is 3", "model.block_size=1"]),
    "softmax_plan": (
        ["--dry-run", "model.head.kind=softmax", "model.block_size=1", "data.path="],
        ["model.vocab_size="],
    ),
    "stop_at": (["train.stop_at=9"], ["train.stop_at 9", "train.steps 5"]),
    "unknown_key": (["model.num_layer=3"], ["model.num_layer ", "command line", "model.num_layers"]),
    "unknown_section": (["modell.bits=3"], ["modell.bits", "model.bits"]),
    "key_without_section": (["seq_length=3"], ["seq_length", "data.seq_length"]),
    "type": (["train.steps=many"], ["train.steps = 'many'", "command line", "integer"]),
    "choice": (["train.precision=fp16"], ["train.precision = 'fp16'", "'fp32', 'bf16', 'fp8' or 'fp8_emulated'"]),
    "fp8_unused": (["fp8.recipe=block"], ["fp8.recipe block", "train.precision fp32", "train.precision=fp8"]),
    "fp8_history": (
        ["train.precision=fp8", "fp8.amax_history=5"],
        ["fp8.amax_history 5", "fp8.recipe delayed", "current"],
    ),
    "fp8_layers": (
        ["train.precision=fp8", "fp8.last_layers_bf16=6"],
        ["fp8.last_layers_bf16 = 6", "model.num_layers 5"],
    ),
    "fp8_not_emulated": (["train.precision=fp8_emulated", "fp8.recipe=nvfp4"], ["nvfp4", "current, delayed, block"]),
    "fp8_channels": (
        ["--dry-run", "train.precision=fp8", "model.ffn_hidden_size=88"],
        ["model.ffn_hidden_size 88", "multiple of 16 x parallel.tp 1 = 16", "fp8.recipe current"],
    ),
    "fp8_rows": (
        [
            "--dry-run",
            "train.precision=fp8",
            "fp8.recipe=mxfp8",
            "model.hidden_size=64",
            "model.ffn_hidden_size=96",
            "model.head.hidden_size=64",
            "model.head.ffn_hidden_size=64",
        ],
        ["train.micro_batch_size 1 x data.seq_length 36 = 36", "multiple of 32", "fp8.recipe mxfp8"],
    ),
    "range": (["model.bits=257"], ["model.bits = 257", "256"]),
    "no_pair": (["train.steps"], ["'train.steps'", "key=value"]),
    "preset": (["--preset", "7b"], ["'7b'", "125m", "laptop"]),
    "json": (["--json"], ["--json", "--dry-run"]),
    "world_size": (["--world-size", "4"], ["--world-size", "--dry-run"]),
    "nproc_0": (["--nproc", "0"], ["--nproc 0", "at least 1"]),
    "nproc_negative": (["--nproc", "-2"], ["--nproc -2", "at least 1"]),
    "world_size_0": (["--dry-run", "--world-size", "0"], ["--world-size 0", "at least 1"]),
    "line_break_in_a_value": (["data.seq_length=37", "data.path=a\nb"], ["data.seq_length 37"]),
}


@pytest.mark.parametrize("name", CONFIGURATION)
def test_a_wrong_configuration(name: str, base: Path) -> None:
    words, parts = CONFIGURATION[name]
    run("train", str(base), *words, timeout=20).refused_alone(*parts)


YAML = {
    "syntax": ("train: [1\n", ["not valid YAML", "line 1"]),
    "list": ("- 1\n", ["mapping", "list"]),
    "twice": ("run: a\nrun: b\n", ["'run'", "twice"]),
    "list_as_key": ("? [1]\n: 2\n", ["not valid YAML"]),
    "unknown": ("model:\n  depth: 3\n", ["model.depth"]),
    "bytes": ("run: \x00\n", ["not valid YAML"]),
    "section_as_value": ("model: 3\n", ["model = 3", "section"]),
}


@pytest.mark.parametrize("name", YAML)
def test_a_bad_file(name: str, tmp_path: Path) -> None:
    text, parts = YAML[name]
    path = tmp_path / "c.yaml"
    path.write_text(text)
    run("train", str(path), timeout=20).refused_alone(str(path), *parts)


def test_no_file_and_no_run(tmp_path: Path) -> None:
    run("train", str(tmp_path / "c.yaml"), timeout=20).refused_alone(str(tmp_path / "c.yaml"), "does not exist")
    run("train", str(tmp_path / "a\nb"), timeout=20).refused_alone("does not exist")
    run("train", str(tmp_path), timeout=20).refused_alone(str(tmp_path), "config.yaml", "run folder")
    run("train", timeout=20).refused_alone("CONFIG.yaml", "--preset")
    run("train", "model.bits=9", timeout=20).refused_alone("CONFIG.yaml", "--preset")


def test_options_may_come_first(base: Path) -> None:
    run("train", "--nproc", "2", str(base), "parallel.tp=3", timeout=20).refused_alone("parallel.tp 3", "world size 2")


def test_a_wrong_environment(base: Path) -> None:
    run("train", str(base), timeout=20, WORLD_SIZE="two").refused_alone("WORLD_SIZE", "two")
    run("train", str(base), timeout=20, RANK="x").refused_alone("RANK", "x")


def test_nproc_is_not_ignored_under_torchrun(base: Path) -> None:
    outcome = run("train", str(base), "--nproc", "4", timeout=20, RANK="0", LOCAL_RANK="0", WORLD_SIZE="2")
    outcome.refused_alone("--nproc 4", "torchrun")


@pytest.mark.parametrize("words", [["train", "--nproc", "x"], ["train", "--npro", "2"], ["tain"], ["data"], []])
def test_a_wrong_command_line(words: list[str]) -> None:
    """The parser's own messages: more than a line, but no traceback, and the same exit code."""
    outcome = run(*words, timeout=20)
    assert outcome.code == 2
    assert outcome.err and "Traceback" not in outcome.err


def test_only_the_first_rank_says_it(base: Path) -> None:
    """What torchrun starts: every rank finds the same mistake, rank 0 prints it."""
    for rank in ("0", "1"):
        outcome = run("train", str(base), "model.bits=0", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", timeout=20)
        assert outcome.code == 2
        assert outcome.err.count("megatron-bit: error") == (rank == "0")


def _edit_manifest(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def outcomes(
    tiny_data: Path, train_args: Any, forked: Any, damaged: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Everything that is found after torch is imported, in one go."""
    root = tmp_path_factory.mktemp("bad")
    missing, short, wide = root / "missing", root / "short", root / "edited"
    for folder in (missing, short, wide):
        shutil.copytree(tiny_data, folder)
    (missing / "train-000001.tar").unlink()
    with open(short / "train-000001.tar", "r+b") as file:
        file.truncate(1024)
    _edit_manifest(wide, vocab_size=9)
    (root / "file").write_text("x")
    (root / "elsewhere").mkdir()
    (root / "here").mkdir()
    (root / "here" / "data").symlink_to(tiny_data)
    busy = socket.create_server(("127.0.0.1", 0))
    port = str(busy.getsockname()[1])
    with socket.create_server(("127.0.0.1", 0)) as probe:
        closed = str(probe.getsockname()[1])
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    soon = "parallel.timeout_minutes=0.05"
    window = ["data.shuffle_shards=1", f"data.path={damaged.folder}", f"train.seed={damaged.seed}", "train.steps=60"]

    def batches(size: int) -> list[str]:
        """A global batch of two micro-batches."""
        return [f"train.global_batch_size={2 * size}", f"train.micro_batch_size={size}"]

    # batch sizes for which the first damaged sample falls to both ranks of a step, or to the second alone
    alone = next(n for n in range(8, 64) if damaged.whole % (2 * n) > n)
    both = next(n for n in range(8, 64) if 0 < damaged.whole % (2 * n) < n)
    crash = ["checkpoint.every=1", "checkpoint.keep=1000", "log.every=1000"]

    def case(name: str, *settings: str, **more: Any) -> dict[str, Any]:
        return {"words": train_args(root / name, *settings), **more}

    fp8_sizes = ["model.hidden_size=64", "model.ffn_hidden_size=96", "data.seq_length=48"]
    fp8_sizes += ["model.head.hidden_size=64", "model.head.ffn_hidden_size=64"]
    cases = {
        "no_path": case("no_path", "data.path=", ranks=2),
        "no_folder": case("no_folder", f"data.path={root / 'nowhere'}", ranks=2),
        "no_manifest": case("no_manifest", f"data.path={root}"),
        "missing_shard": case("missing_shard", f"data.path={missing}", ranks=2),
        "short_shard": case("short_shard", f"data.path={short}"),
        "edited": case("edited", f"data.path={wide}"),
        "bits": case("bits", "model.bits=8", ranks=2),
        "fp8": case("fp8", "train.precision=fp8", *fp8_sizes, ranks=2),
        "long": case("long", "data.seq_length=300000"),
        "run_is_a_file": case("run_is_a_file", f"run={root / 'file'}", ranks=2),
        "run_below_a_file": case("run_below_a_file", f"run={root / 'file' / 'run'}"),
        "run_on_proc": case("run_on_proc", "run=/proc/run"),
        "run": case("run", "train.stop_at=1"),
        "another_model": case("run", "model.hidden_size=56", ranks=2),
        "another_seed": case("run", "train.seed=3"),
        "busy_port": case("busy_port", env={**one, "MASTER_PORT": port}),
        "no_port": case("no_port", env=one),
        "no_rank_0": case("no_rank_0", soon, env={**one, "RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": closed}),
        "no_rank_1": case("no_rank_1", soon, env={**one, "WORLD_SIZE": "2", "MASTER_PORT": closed}),
        "data_on_one_node": case(
            "data_on_one_node", "data.path=data", ranks=2, cwd=[str(root / "here"), str(root / "elsewhere")]
        ),
        "damaged_alone": case("damaged_alone", *window, *batches(alone), ranks=2),
        "damaged_both": case("damaged_both", *window, *batches(both), ranks=2),
        "damaged_tp": case("damaged_tp", *window, *batches(8), "parallel.tp=2", ranks=2),
        "damaged_pp": case("damaged_pp", *window, *batches(8), "parallel.pp=2", ranks=2),
        "crash": case("crash", *window, *batches(8), *crash),
        "log_is_a_folder": case("log_is_a_folder", ranks=2),
        "generate_nothing": {"words": ["generate", str(root / "nowhere")]},
        "generate_sampler": {"words": ["generate", str(root / "run"), "--sampler", "sde"]},
        "generate_steps": {"words": ["generate", str(root / "run"), "--steps", "1"]},
        "generate_moved": {"words": ["generate", str(root / "run"), "--data", str(root / "nowhere")]},
        "generate_prompts": {"words": ["generate", str(root / "run"), "--prompt-file", str(root / "nowhere.txt")]},
        "generate_stream": {"words": ["generate", str(root / "run"), "--stream", "--json"]},
        "convert_nothing": {"words": ["convert", str(root / "nowhere"), str(root / "hf"), "--to", "hf"]},
        "convert_full": {"words": ["convert", str(root / "run"), "--to", "hf", str(root / "run")]},
        "convert_size": {"words": ["convert", str(root / "run"), str(root / "hf"), "--shard-size", "5 boxes"]},
    }
    (root / "log_is_a_folder" / "log.jsonl").mkdir(parents=True)
    with busy:
        found = {name: forked(**case) for name, case in cases.items()}
    assert found["run"].code == 0, found["run"].err
    return {**found, "root": root, "port": port, "closed": closed}


# name -> what the one line has to say, beside the folder of the case in {root}
FOUND_LATER = {
    "no_path": ["data.path is not set", "megatron-bit prepare"],
    "no_folder": ["{root}/nowhere", "does not exist", "megatron-bit prepare"],
    "no_manifest": ["{root}", "manifest.json"],
    "missing_shard": ["{root}/missing/train-000001.tar", "No such file", "copy it back"],
    "short_shard": ["{root}/short/train-000001.tar", "1024 bytes", "copy it again"],
    "edited": ["{root}/edited/manifest.json", "edited"],
    "bits": ["model.bits 8", "421 tokens", "256", "model.bits=9"],
    "fp8": ["train.precision fp8 needs an NVIDIA GPU", "train.precision=bf16, or fp8_emulated"],
    "long": ["seq_length 300000", "lower seq_length"],
    "run_is_a_file": ["{root}/file", "Not a directory"],
    "run_below_a_file": ["{root}/file/run", "Not a directory"],
    "run_on_proc": ["/proc/run", "cannot be used"],
    "another_model": ["{root}/run", "model.hidden_size is 48 there and 56 here", "run=..."],
    "another_seed": ["{root}/run", "train.seed is 1234 there and 3 here"],
    "busy_port": ["127.0.0.1:{port}", "choose a free one"],
    "no_port": ["MASTER_PORT"],
    "data_on_one_node": ["data does not exist; if it has moved", "(rank 1"],
    "damaged_alone": ["train-0", "is damaged", "copy it again", "(rank 1)"],
    "damaged_both": ["train-0", "is damaged", "copy it again"],
    "damaged_tp": ["train-0", "is damaged"],
    "damaged_pp": ["train-0", "is damaged"],
    "crash": ["train-0", "is damaged"],
    "log_is_a_folder": ["log.jsonl", "Is a directory"],
    "generate_nothing": ["{root}/nowhere", "no complete checkpoint", "train first"],
    "generate_sampler": ["--sampler sde", "ode"],
    "generate_steps": ["--steps 1", "at least 2"],
    "generate_moved": ["{root}/nowhere"],
    "generate_prompts": ["{root}/nowhere.txt", "one prompt a line"],
    "generate_stream": ["--stream", "--json"],
    "convert_nothing": ["{root}/nowhere", "no complete checkpoint"],
    "convert_full": ["{root}/run", "not an empty folder"],
    "convert_size": ["--shard-size 5 boxes", "5GB"],
}


@pytest.mark.parametrize("name", FOUND_LATER)
def test_found_after_the_start(name: str, outcomes: dict[str, Any]) -> None:
    outcome = outcomes[name]
    outcome.refused(*(part.format_map(outcomes) for part in FOUND_LATER[name]))
    # if rank 0, which holds the store, is the one that leaves, the others can only say that they lost it
    others = [line for line in outcome.err.splitlines() if not line.startswith("megatron-bit: error:")]
    assert all(name.startswith("damaged") and " stopped: another rank has ended" in line for line in others), others


@pytest.mark.parametrize("name", ["no_rank_0", "no_rank_1"])
def test_a_rank_that_does_not_come(name: str, outcomes: dict[str, Any]) -> None:
    """The rank that waits says so, whatever its number; torch warns as well."""
    outcome = outcomes[name]
    assert outcome.code == 87, outcome.err  # a lost node to a launcher, and no mistake
    (line,) = (line for line in outcome.err.splitlines() if line.startswith("megatron-bit: error:"))
    assert "have not come together in " in line and f"127.0.0.1:{outcomes['closed']}" in line


def test_the_log_has_every_step_that_was_saved(outcomes: dict[str, Any]) -> None:
    """Even with log.every far above checkpoint.every, and a run that dies: it goes on from there."""
    run_folder = outcomes["root"] / "crash"
    saved = [step_of(folder.name) for folder in complete(run_folder / "checkpoints")]
    logged = [json.loads(line)["step"] for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert saved == list(range(1, saved[-1] + 1))
    assert logged in (saved, [*saved, saved[-1] + 1])  # a save may have been in flight


def test_torchrun(train_args: Any, tmp_path: Path) -> None:
    """torchrun adds its own report, and its exit code is 1."""
    outcome = run(*train_args(tmp_path / "run", "model.bits=8"), command=TORCHRUN)
    assert outcome.code == 1
    assert outcome.err.count("megatron-bit: error: model.bits 8 ") == 1
    assert "megatron_bit/cli.py" not in outcome.err  # our traceback


def test_nproc_with_a_damaged_shard(train_args: Any, damaged: Any, tmp_path: Path) -> None:
    """Rank 1 finds it in the middle of the run; rank 0, waiting in a collective, ends without a word."""
    size = next(n for n in range(8, 64) if damaged.whole % (2 * n) > n)
    outcome = run(
        *train_args(tmp_path / "run", f"data.path={damaged.folder}", f"train.seed={damaged.seed}"),
        *("--nproc", "2", "data.shuffle_shards=1", "train.steps=60"),
        *(f"train.global_batch_size={2 * size}", f"train.micro_batch_size={size}"),
        timeout=40,
    )
    outcome.refused_alone("is damaged", "(rank 1)")
