"""A run that stops and goes on is the run that never stopped: same layout to the bit, any other within rounding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from gloo_ranks import run_ranks

from megatron_bit.run.checkpoints import newest_step

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "single_zero1": (1, {"parallel.zero_stage": 1}),
    "tp2_pp2": (4, {"parallel.tp": 2, "parallel.pp": 2, "parallel.zero_stage": 1}),
    "pp2_dp2_zero0": (4, {"parallel.pp": 2, "parallel.zero_stage": 0}),
    "pp2_interleaved": (2, {"parallel.pp": 2, "parallel.vpp": 2}),
    "dp2_zero1": (2, {}),
    "dp2_zero2": (2, {"parallel.zero_stage": 2}),
    "dp2_zero3": (2, {"parallel.zero_stage": 3}),
    "tp2_dp2_zero3": (4, {"parallel.tp": 2, "parallel.zero_stage": 3}),
    "tp4": (4, {"parallel.tp": 4}),
}


def _train(name: str, run: Path, data: Path, **settings: Any) -> None:
    world, layout = LAYOUTS[name]
    codes = run_ranks(tiny_runs.train, world, tiny_runs.overrides(run, data, {**layout, **settings}))
    assert set(codes) == {0}


@pytest.mark.parametrize("name", ["single", "single_zero1", "tp2_pp2", "pp2_dp2_zero0", "dp2_zero2", "dp2_zero3"])
def test_same_layout_continues_bit_identically(name: str, tiny_data: Path, tmp_path: Path) -> None:
    _train(name, tmp_path / "whole", tiny_data)
    _train(name, tmp_path / "halves", tiny_data, **{"train.stop_at": 3})
    assert not (tmp_path / "halves" / "FINISHED").exists()
    _train(name, tmp_path / "halves", tiny_data)
    assert (tmp_path / "halves" / "FINISHED").exists()
    whole, halves = tiny_runs.read(tmp_path / "whole"), tiny_runs.read(tmp_path / "halves")
    assert halves.loss == whole.loss
    assert tiny_runs.worst(halves.weights, whole.weights)[0] == 0.0


@pytest.mark.parametrize("name", ["tp2_pp2", "dp2_zero2"])
def test_measured_noise_levels_continue(name: str, tiny_data: Path, tmp_path: Path) -> None:
    measured = {"diffusion.noise": "entropy_rate", "diffusion.noise_warmup": 1}
    _train(name, tmp_path / "whole", tiny_data, **measured)
    _train(name, tmp_path / "halves", tiny_data, **measured, **{"train.stop_at": 3})
    shutil.copytree(tmp_path / "halves", tmp_path / "elsewhere")
    _train(name, tmp_path / "halves", tiny_data, **measured)
    whole, halves = tiny_runs.read(tmp_path / "whole"), tiny_runs.read(tmp_path / "halves")
    assert halves.loss == whole.loss and halves.bound == whole.bound
    assert tiny_runs.worst(halves.weights, whole.weights)[0] == 0.0
    tables = [_noise_table(tmp_path / run) for run in ("whole", "halves")]
    assert tables[0] == tables[1] and tables[0]["steps"] == 5 and sum(tables[0]["counts"]) > 4
    _train("pp2_interleaved", tmp_path / "elsewhere", tiny_data, **measured)
    assert tiny_runs.read(tmp_path / "elsewhere").loss == pytest.approx(whole.loss, abs=1e-5)
    assert _noise_table(tmp_path / "elsewhere")["sums"] == pytest.approx(tables[0]["sums"], rel=1e-4, abs=1e-6)


def _noise_table(run: Path) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / "step-00000005" / "meta.json").read_text())["noise_table"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("tp2_pp2", "dp2_zero1"),
        ("single", "tp2_dp2_zero3"),
        ("dp2_zero3", "tp4"),
        ("pp2_interleaved", "dp2_zero2"),
        ("tp4", "single"),
        ("dp2_zero2", "pp2_interleaved"),
        ("pp2_dp2_zero0", "dp2_zero1"),
        ("dp2_zero3", "pp2_dp2_zero0"),
    ],
)
def test_another_layout_continues_within_rounding(first: str, second: str, tiny_data: Path, tmp_path: Path) -> None:
    _train("single", tmp_path / "whole", tiny_data)
    _train(first, tmp_path / "halves", tiny_data, **{"train.stop_at": 2})
    _train(second, tmp_path / "halves", tiny_data)
    whole, halves = tiny_runs.read(tmp_path / "whole"), tiny_runs.read(tmp_path / "halves")
    assert halves.loss == pytest.approx(whole.loss, abs=1e-5)
    assert halves.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
    assert tiny_runs.worst(halves.weights, whole.weights)[0] < 1e-5


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {"parallel.pp": 2}),
        (4, {"parallel.tp": 4, "parallel.zero_stage": 3}),
        (3, {"parallel.zero_stage": 2}),
        (6, {"parallel.tp": 2, "parallel.zero_stage": 0}),
        (1, {}),
    ],
)
def test_resharding_goes_on_with_the_optimizer(
    world: int, layout: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    """Saved at TP 2 x DP 2; continued at PP 2, TP 4, DP 3, TP 2 x DP 3 and in one process, in other ZeRO stages."""
    common = {"train.global_batch_size": 12}  # a multiple of 3
    first = {"parallel.tp": 2, "parallel.zero_stage": 1, "train.stop_at": 2}
    assert set(run_ranks(tiny_runs.train, 1, tiny_runs.overrides(tmp_path / "whole", tiny_data, common))) == {0}
    for ranks, settings in ((4, first), (world, layout)):
        run_ranks(tiny_runs.train, ranks, tiny_runs.overrides(tmp_path / "run", tiny_data, {**common, **settings}))
    whole, run = tiny_runs.read(tmp_path / "whole"), tiny_runs.read(tmp_path / "run")
    assert run.loss == pytest.approx(whole.loss, abs=1e-5)
    assert run.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
    assert tiny_runs.worst(run.weights, whole.weights)[0] < 1e-5


@pytest.mark.parametrize("stage", [0, 1])
def test_bf16_resumes_from_its_masters(stage: int, tiny_data: Path, tmp_path: Path) -> None:
    bf16 = {"train.precision": "bf16", "parallel.zero_stage": stage}
    _train("single", tmp_path / "whole", tiny_data, **bf16)
    _train("single", tmp_path / "halves", tiny_data, **bf16, **{"train.stop_at": 3})
    _train("single", tmp_path / "halves", tiny_data, **bf16)
    whole, halves = tiny_runs.read(tmp_path / "whole"), tiny_runs.read(tmp_path / "halves")
    assert halves.loss == whole.loss
    assert tiny_runs.worst(halves.weights, whole.weights)[0] == 0.0


def test_counters_and_kept_checkpoints(tiny_data: Path, tmp_path: Path) -> None:
    _train("single", tmp_path / "run", tiny_data, **{"checkpoint.every": 1, "checkpoint.keep": 2})
    folders = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert folders == ["step-00000004", "step-00000005"]
    meta = json.loads((tmp_path / "run" / "checkpoints" / "step-00000004" / "meta.json").read_text())
    assert meta["state"]["step"] == 4
    assert meta["state"]["samples"] == 16
    assert meta["state"]["tokens"] == 16 * 36
    assert meta["updates"] == 4


def test_a_finished_run_stays_as_it_is(tiny_data: Path, tmp_path: Path) -> None:
    _train("single", tmp_path / "run", tiny_data)
    before = (tmp_path / "run" / "log.jsonl").read_text()
    _train("single", tmp_path / "run", tiny_data)
    assert (tmp_path / "run" / "log.jsonl").read_text() == before
    assert (tmp_path / "run" / "FINISHED").exists()


def test_an_uncommitted_checkpoint_is_not_seen(tiny_data: Path, tmp_path: Path) -> None:
    _train("single", tmp_path / "whole", tiny_data)
    _train("single", tmp_path / "run", tiny_data, **{"checkpoint.every": 2, "train.stop_at": 4})
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    (newest / "COMMITTED").unlink()
    _train("single", tmp_path / "run", tiny_data)
    for name, steps in (("log.jsonl", [1, 2, 3, 4, 5]), ("rolled_back.jsonl", [3, 4])):
        records = [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]
        assert [r["step"] for r in records] == steps
    whole = tiny_runs.read(tmp_path / "whole")
    assert tiny_runs.worst(tiny_runs.read(tmp_path / "run").weights, whole.weights)[0] == 0.0


def test_a_file_that_one_rank_misses_stops_all_ranks(tiny_data: Path, tmp_path: Path) -> None:
    """Each rank looks at a share of the files; all of them learn what one has found."""
    _train("dp2_zero1", tmp_path / "run", tiny_data, **{"train.stop_at": 2})
    (tmp_path / "run" / "checkpoints" / "step-00000002" / "rank-00001.safetensors").unlink()
    with pytest.raises(AssertionError, match=r"UserError: all 1 checkpoints .* damaged .*rank-00001.safetens"):
        _train("dp2_zero1", tmp_path / "run", tiny_data)


@pytest.mark.parametrize("step", [3, 5])
def test_a_validation_that_there_was_no_time_for_is_made_up(step: int, tiny_data: Path, tmp_path: Path) -> None:
    """Asked to leave at a step with a validation, also at the last: the next start has it, and marks the run."""
    settings = {"evaluate.every": 3, "evaluate.samples": 4, "checkpoint.mirror": (tmp_path / "there").as_uri()}
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert set(run_ranks(tiny_runs.train, 2, tiny_runs.overrides(whole, tiny_data, settings))) == {0}
    shutil.rmtree(tmp_path / "there")
    arguments = tiny_runs.overrides(run, tiny_data, settings)
    assert set(run_ranks(tiny_runs.train_asked, 2, arguments, step)) == {85}
    assert newest_step(run / "checkpoints") == step and not (run / "FINISHED").exists()
    shutil.rmtree(tmp_path / "there", ignore_errors=True)  # the copy that leaving did not wait for
    assert set(run_ranks(tiny_runs.train, 2, arguments)) == {0}
    assert (run / "validation.jsonl").read_text() == (whole / "validation.jsonl").read_text()
    assert (run / "FINISHED").exists() and (tmp_path / "there" / "step-00000005" / "COMMITTED").exists()
    assert set(run_ranks(tiny_runs.train, 2, arguments)) == {0}  # and nothing twice
    assert (run / "validation.jsonl").read_text() == (whole / "validation.jsonl").read_text()
