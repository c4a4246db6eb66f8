"""Every layout trains the single process's model: losses over 5 steps, gradient norms, final weights (fp32)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from gloo_ranks import run_ranks
from tiny_runs import Result

TOLERANCE = 1e-5

LAYOUTS = {
    "tp2_sp": (2, {"parallel.tp": 2}),
    "tp2_sp_zero1": (2, {"parallel.tp": 2, "parallel.zero_stage": 1}),
    "tp2": (2, {"parallel.tp": 2, "parallel.sequence_parallel": False}),
    "tp4_sp": (4, {"parallel.tp": 4}),
    "pp2": (2, {"parallel.pp": 2}),
    "pp3": (3, {"parallel.pp": 3}),
    "pp2_interleaved": (2, {"parallel.pp": 2, "parallel.vpp": 2}),
    "tp2_pp2": (4, {"parallel.tp": 2, "parallel.pp": 2}),
    "tp2_pp2_zero1": (4, {"parallel.tp": 2, "parallel.pp": 2, "parallel.zero_stage": 1}),
    "tp2_pp2_no_sp": (4, {"parallel.tp": 2, "parallel.pp": 2, "parallel.sequence_parallel": False}),
    "one_zero1": (1, {"parallel.zero_stage": 1}),
    "dp2_zero0": (2, {"parallel.zero_stage": 0}),
    "dp2_zero1": (2, {"parallel.zero_stage": 1}),
    "dp2_zero2": (2, {"parallel.zero_stage": 2}),
    "dp2_zero3": (2, {"parallel.zero_stage": 3}),
    "dp4_zero1": (4, {"parallel.zero_stage": 1, "train.micro_batch_size": 2, "train.global_batch_size": 8}),
    "tp2_dp2_zero2": (4, {"parallel.tp": 2, "parallel.zero_stage": 2}),
    "tp2_dp2_zero3": (4, {"parallel.tp": 2, "parallel.zero_stage": 3}),
    "pp2_dp2": (4, {"parallel.pp": 2}),
    "tp2_dp2_zero0": (4, {"parallel.tp": 2, "parallel.zero_stage": 0}),
    "pp2_dp2_zero0": (4, {"parallel.pp": 2, "parallel.zero_stage": 0}),
    "pp2_recompute": (2, {"parallel.pp": 2, "parallel.recompute": "full"}),
    "tp2_pp2_dp2_interleaved": (
        8,
        {"parallel.tp": 2, "parallel.pp": 2, "parallel.vpp": 2, "parallel.recompute": "full"},
    ),
}


@pytest.fixture(scope="module")
def single(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """The single process's result for a set of settings; computed once for each."""
    known: dict[str, Result] = {}

    def run(**settings: object) -> Result:
        key = repr(sorted(settings.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("single") / "run"
            assert run_ranks(tiny_runs.train, 1, tiny_runs.overrides(folder, tiny_data, settings)) == [0]
            known[key] = tiny_runs.read(folder)
        return known[key]

    return run


def _batch(settings: dict[str, Any]) -> dict[str, Any]:
    """What is one process's affair too."""
    return {key: value for key, value in settings.items() if key == "train.global_batch_size"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_single_process(
    name: str, single: Callable[..., Result], tiny_data: Path, tmp_path: Path
) -> None:
    world, settings = LAYOUTS[name]
    assert set(run_ranks(tiny_runs.train, world, tiny_runs.overrides(tmp_path / "run", tiny_data, settings))) == {0}
    result, reference = tiny_runs.read(tmp_path / "run"), single(**_batch(settings))
    assert len(result.loss) == tiny_runs.STEPS
    assert result.loss == pytest.approx(reference.loss, abs=TOLERANCE)
    assert result.bound == pytest.approx(reference.bound, rel=TOLERANCE)
    assert result.grad_norm == pytest.approx(reference.grad_norm, rel=1e-4)
    difference, where = tiny_runs.worst(result.weights, reference.weights)
    assert difference < TOLERANCE, where


@pytest.mark.parametrize("attention", ["causal", "block_causal"])
@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_variants_under_tp_and_pp(
    attention: str, loss: str, single: Callable[..., Result], tiny_data: Path, tmp_path: Path
) -> None:
    variant = {"model.attention": attention, "diffusion.loss": loss, "model.code": "gray"}
    layout = {"parallel.tp": 2, "parallel.pp": 2}
    run_ranks(tiny_runs.train, 4, tiny_runs.overrides(tmp_path / "run", tiny_data, {**variant, **layout}))
    result, reference = tiny_runs.read(tmp_path / "run"), single(**variant)
    assert result.loss == pytest.approx(reference.loss, abs=TOLERANCE)
    assert tiny_runs.worst(result.weights, reference.weights)[0] < TOLERANCE
    assert reference.loss != single().loss  # the variant is another model


# many variants, and DeepSpeed's ZeRO-3 takes its time for each module and micro-batch
FEWER = {"train.steps": 3, "model.num_layers": 3}
NAMES = {
    "model.head.kind": "chain", "model.group_bits": 4, "model.names": "pairs", "model.head.prior_rank": 6,
}  # fmt: skip

SEEING = {
    "model.group_bits": 4, "model.names": "pairs", "model.head.token_before": True, "model.head.soft_prior": True,
}  # fmt: skip
MEMORY = {
    "model.head.kind": "chain", "model.group_bits": 4, "model.memory.rows": 50, "model.memory.hashes": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "variant",
    [
        {"model.group_bits": 4, "diffusion.loss": "mse"},
        {"model.group_bits": 5, "model.head.prior": False, "diffusion.parameterization": "direct"},
        {"model.group_bits": 4, "model.head.kind": "chain"},
        {"model.head.kind": "chain", "model.block_size": 1},
        NAMES,
        {**NAMES, "parallel.recompute": "head", "diffusion.condition_drop": 0.4},
        {"model.group_bits": 4, "model.names": "pairs"},
        {**NAMES, "diffusion.noisy_every": 5},
        {**MEMORY, "diffusion.noisy_every": 2, "parallel.recompute": "head", "diffusion.condition_drop": 0.4},
        SEEING,
        {**SEEING, "diffusion.levels_apart": 1},
        {
            **SEEING, "parallel.recompute": "head", "diffusion.levels_apart": 1, "diffusion.condition_drop": 0.4,
            "diffusion.self_condition": 0.5,
        },  # fmt: skip
        MEMORY,
        {**MEMORY, "parallel.recompute": "head", "diffusion.context_noise": 0.5, "parallel.sequence_parallel": False},
        {"model.memory.rows": 30, "model.memory.orders": [1, 3]},
        {"diffusion.context_noise": 0.5},
        {"diffusion.condition_drop": 0.4},
        {"diffusion.condition_drop": 0.4, "model.head.kind": "chain", "model.group_bits": 4},
        {"diffusion.self_condition": 0.5, "model.group_bits": 4},
        {"parallel.recompute": "head", "diffusion.condition_drop": 0.4},
        {"parallel.recompute": "head", "model.head.kind": "chain", "model.group_bits": 4},
        {"model.head_dim": 18, "model.num_kv_heads": 2},
    ],
    ids=lambda variant: ",".join(f"{k}={v}" for k, v in variant.items()),
)
@pytest.mark.parametrize("layout", ["tp2_pp2", "tp2_dp2_zero3"])
def test_groups_and_chain(
    layout: str, variant: dict[str, object], single: Callable[..., Result], tiny_data: Path, tmp_path: Path
) -> None:
    (world, settings), variant = LAYOUTS[layout], {**variant, **FEWER}
    run_ranks(tiny_runs.train, world, tiny_runs.overrides(tmp_path / "run", tiny_data, {**settings, **variant}))
    result, reference = tiny_runs.read(tmp_path / "run"), single(**variant)
    assert result.loss == pytest.approx(reference.loss, abs=TOLERANCE)
    assert result.bound == pytest.approx(reference.bound, rel=TOLERANCE)
    assert result.grad_norm == pytest.approx(reference.grad_norm, rel=1e-4)
    assert tiny_runs.worst(result.weights, reference.weights)[0] < TOLERANCE
    assert reference.loss != single(**FEWER).loss


@pytest.mark.parametrize("layout", ["tp2_pp2", "dp2_zero2", "pp2_interleaved", "dp4_zero1"])
def test_measured_noise_levels(layout: str, single: Callable[..., Result], tiny_data: Path, tmp_path: Path) -> None:
    """The histogram is that of the global batch, whoever drew it, and every stage and checkpoint has the same table."""
    world, settings = LAYOUTS[layout]
    measured = {"diffusion.noise": "entropy_rate", "diffusion.noise_warmup": 1}
    run_ranks(tiny_runs.train, world, tiny_runs.overrides(tmp_path / "run", tiny_data, {**settings, **measured}))
    result, reference = tiny_runs.read(tmp_path / "run"), single(**measured, **_batch(settings))
    assert result.loss == pytest.approx(reference.loss, abs=TOLERANCE)
    assert result.bound == pytest.approx(reference.bound, rel=TOLERANCE)
    assert tiny_runs.worst(result.weights, reference.weights)[0] < TOLERANCE
    warm = single(**{**measured, **_batch(settings), "diffusion.noise_warmup": 100})
    assert reference.loss[:2] == warm.loss[:2] and reference.loss[3] != warm.loss[3]


def test_same_seed_same_layout_is_bit_identical(tiny_data: Path, tmp_path: Path) -> None:
    layout = {"parallel.tp": 2, "parallel.pp": 2}
    results = []
    for name in ("a", "b"):
        run_ranks(tiny_runs.train, 4, tiny_runs.overrides(tmp_path / name, tiny_data, layout))
        results.append(tiny_runs.read(tmp_path / name))
    assert results[0].loss == results[1].loss
    assert tiny_runs.worst(results[0].weights, results[1].weights)[0] == 0.0


@pytest.mark.parametrize("layout", ["tp2_pp2", "one_zero1", "dp2_zero0", "dp2_zero1", "dp2_zero2", "dp2_zero3"])
def test_bf16_keeps_fp32_masters(layout: str, single: Callable[..., Result], tiny_data: Path, tmp_path: Path) -> None:
    world, settings = LAYOUTS[layout]
    bf16 = {"train.precision": "bf16"}
    run_ranks(tiny_runs.train, world, tiny_runs.overrides(tmp_path / "run", tiny_data, {**settings, **bf16}))
    result, reference, full = tiny_runs.read(tmp_path / "run"), single(**bf16), single()
    assert result.loss == pytest.approx(reference.loss, rel=2e-2)
    assert reference.loss == pytest.approx(full.loss, rel=2e-2)
    assert tiny_runs.worst(result.weights, reference.weights)[0] < 2e-2
    masters = result.weights["backbone.layers.0.mlp.linear_fc1.gate.weight"]
    assert (masters != masters.bfloat16().float()).any()  # they hold more than bf16 can
