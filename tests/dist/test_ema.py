"""The average of the weights: the plain recurrence in every layout, through skipped updates, resumes and conversion."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from gloo_ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor

from megatron_bit.errors import UserError
from megatron_bit.inference.convert import to_hf
from megatron_bit.inference.generate import Generator

DECAY = 0.7
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "dp2_zero0": (2, {"parallel.zero_stage": 0}),
    "dp2_zero1": (2, {"parallel.zero_stage": 1}),
    "dp2_zero2": (2, {"parallel.zero_stage": 2}),
    "dp2_zero3": (2, {"parallel.zero_stage": 3}),
    "tp2_pp2": (4, {"parallel.tp": 2, "parallel.pp": 2}),
    "tp2_pp2_zero1": (4, {"parallel.tp": 2, "parallel.pp": 2, "parallel.zero_stage": 1}),
    "bf16": (1, {"train.precision": "bf16"}),
    "bf16_pp2_zero1": (2, {"train.precision": "bf16", "parallel.pp": 2, "parallel.zero_stage": 1}),
    "bf16_dp2_zero2": (2, {"train.precision": "bf16", "parallel.zero_stage": 2}),
    "bf16_dp2_zero3": (2, {"train.precision": "bf16", "parallel.zero_stage": 3}),
}


def state(run: Path, step: int, name: str) -> dict[str, Tensor]:
    return tiny_runs.read_state(run / "checkpoints" / f"step-{step:08d}", name)


def moved(average: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: DECAY * value + (1 - DECAY) * weights[name] for name, value in average.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_average_is_the_recurrence(name: str, tiny_data: Path, tmp_path: Path) -> None:
    """The third update is skipped: one of the ranks has a gradient that is not finite."""
    world, layout = LAYOUTS[name]
    settings = {**layout, "optim.ema_decay": DECAY, "checkpoint.initial": True}
    tiny_runs.train_beyond_the_bad_step(
        tiny_runs.train_spiked, world, tmp_path / "run", tiny_data, settings, math.nan
    )
    assert tiny_runs.read(tmp_path / "run").skipped == [False, False, True, False, False]
    average = state(tmp_path / "run", 0, "param")
    for step in range(6):
        weights = state(tmp_path / "run", step, "param")
        if step not in (0, 3):
            average = moved(average, weights)
        difference, where = tiny_runs.worst(state(tmp_path / "run", step, "ema"), average)
        assert difference < 1e-6, (step, where)
    assert tiny_runs.worst(average, weights)[0] > 1e-3


@pytest.fixture(scope="module")
def whole(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("ema") / "whole"
    run_ranks(tiny_runs.train, 1, tiny_runs.overrides(run, tiny_data, {"optim.ema_decay": DECAY}))
    return run


@pytest.mark.parametrize(("first", "second"), [("dp2_zero3", "tp2_pp2"), ("tp2_pp2_zero1", "dp2_zero2")])
def test_resharded(first: str, second: str, whole: Path, tiny_data: Path, tmp_path: Path) -> None:
    for name, more in ((first, {"train.stop_at": 3}), (second, {})):
        world, layout = LAYOUTS[name]
        settings = {**layout, **more, "optim.ema_decay": DECAY}
        run_ranks(tiny_runs.train, world, tiny_runs.overrides(tmp_path / "run", tiny_data, settings))
    assert tiny_runs.worst(state(tmp_path / "run", 5, "ema"), state(whole, 5, "ema"))[0] < 1e-5


@pytest.mark.parametrize("name", ["single", "dp2_zero1"])
def test_turned_on_and_off(name: str, tiny_data: Path, tmp_path: Path) -> None:
    world, layout = LAYOUTS[name]
    for stop, decay in ((2, 0.0), (3, DECAY), (4, DECAY), (5, 0.0)):
        settings = {**layout, "train.stop_at": stop, "optim.ema_decay": decay, "checkpoint.keep": 9}
        run_ranks(tiny_runs.train, world, tiny_runs.overrides(tmp_path / "run", tiny_data, settings))
    run = tmp_path / "run"
    average = state(run, 2, "param")  # begins with the weights, and is continued to the bit
    for step in (3, 4):
        average = moved(average, state(run, step, "param"))
        assert tiny_runs.worst(state(run, step, "ema"), average)[0] < 1e-6
    for step in (2, 5):
        index = json.loads((run / "checkpoints" / f"step-{step:08d}" / "index.json").read_text())
        assert all(set(entry["states"]) == {"param", "exp_avg", "exp_avg_sq"} for entry in index.values())


def test_training_does_not_see_it(whole: Path, tiny_data: Path, tmp_path: Path) -> None:
    run_ranks(tiny_runs.train, 1, tiny_runs.overrides(tmp_path / "run", tiny_data, {}))
    without, with_average = tiny_runs.read(tmp_path / "run"), tiny_runs.read(whole)
    assert without.loss == with_average.loss
    assert tiny_runs.worst(without.weights, with_average.weights)[0] == 0.0
    with pytest.raises(UserError, match=r"has no average of the weights .* leave out --weights ema"):
        Generator(tmp_path / "run", weights="ema")


def test_convert_and_generate_take_what_is_asked_for(whole: Path, tmp_path: Path) -> None:
    to_hf(whole, tmp_path / "trained")
    to_hf(whole, tmp_path / "ema", weights="ema")
    for folder, name in (("trained", "param"), ("ema", "ema")):
        made = load_file(tmp_path / folder / "model.safetensors")["head.out_proj.weight"]
        assert torch.equal(made, state(whole, 5, name)["head.output.weight"])
        own = Generator(whole, weights="ema" if name == "ema" else "trained").model.head.out_proj.weight
        assert torch.equal(own, made)
    config = json.loads((tmp_path / "ema" / "config.json").read_text())
    assert config["training_weights"] == "ema"
    with pytest.raises(UserError, match="--weights ema has no use here"):
        Generator(tmp_path / "ema", weights="ema")
