"""Updates that must not happen: non-finite gradients on one rank, and loss spikes. All ranks skip alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "single_zero1": (1, {"parallel.zero_stage": 1}),
    "dp2_zero0": (2, {"parallel.zero_stage": 0}),
    "dp2_zero1": (2, {}),
    "dp2_zero2": (2, {"parallel.zero_stage": 2}),
    "dp2_zero3": (2, {"parallel.zero_stage": 3}),
    "tp2_pp2": (4, {"parallel.tp": 2, "parallel.pp": 2}),
    "tp2_pp2_zero1": (4, {"parallel.tp": 2, "parallel.pp": 2, "parallel.zero_stage": 1}),
    "bf16": (1, {"train.precision": "bf16"}),
    "bf16_zero1": (1, {"train.precision": "bf16", "parallel.zero_stage": 1}),
    "bf16_pp2": (2, {"train.precision": "bf16", "parallel.pp": 2}),
    "bf16_pp2_zero1": (2, {"train.precision": "bf16", "parallel.pp": 2, "parallel.zero_stage": 1}),
    "bf16_dp2_zero2": (2, {"train.precision": "bf16", "parallel.zero_stage": 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_non_finite_gradients_skip_the_update_everywhere(name: str, tiny_data: Path, tmp_path: Path) -> None:
    world, settings = LAYOUTS[name]
    tiny_runs.train_beyond_the_bad_step(tiny_runs.train_spiked, world, tmp_path / "run", tiny_data, settings, math.nan)
    result = tiny_runs.read(tmp_path / "run")
    assert result.skipped == [False, False, True, False, False]
    assert all(torch.isfinite(w).all() for w in result.weights.values())
    before, after, later = (
        tiny_runs.read_state(tmp_path / "run" / "checkpoints" / f"step-{step:08d}", "param") for step in (2, 3, 4)
    )
    assert tiny_runs.worst(before, after)[0] == 0.0  # also the master weights of every shard
    assert tiny_runs.worst(after, later)[0] > 1e-4
    assert '"skipped": 1' in (tmp_path / "run/checkpoints/step-00000005/meta.json").read_text()


@pytest.mark.parametrize("name", LAYOUTS)
def test_spike_guard_skips_the_update_everywhere(name: str, tiny_data: Path, tmp_path: Path) -> None:
    world, settings = LAYOUTS[name]
    settings = {**settings, "optim.spike_guard": 3.0}
    tiny_runs.train_beyond_the_bad_step(tiny_runs.train_guarded, world, tmp_path / "run", tiny_data, settings)
    result = tiny_runs.read(tmp_path / "run")
    assert result.skipped == [False, False, True, False, False]
    folder = tmp_path / "run" / "checkpoints"
    before, after, later = (tiny_runs.read_state(folder / f"step-{step:08d}", "exp_avg") for step in (2, 3, 4))
    assert tiny_runs.worst(before, after)[0] == 0.0  # the moments did not see the spike either
    assert tiny_runs.worst(after, later)[0] > 0.0
