"""What `--dry-run` promises, against the model that is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import world

from megatron_bit.bench.saved import Saved
from megatron_bit.config import load_config
from megatron_bit.errors import UserError
from megatron_bit.model.build import build_model
from megatron_bit.model.chunk import TokenBatch
from megatron_bit.parallel.dims import ParallelDims
from megatron_bit.planning.dry_run import describe, render
from megatron_bit.planning.memory import memory_per_rank
from megatron_bit.planning.parameters import parameter_counts

SOFTMAX = ["model.head.kind=softmax", "model.block_size=1", "model.vocab_size=4096"]
JOINT = ["model.head.kind=diffusion", "model.group_bits=6", "diffusion.self_condition=0.5"]
BITS = ["model.head.kind=diffusion", "model.group_bits=1"]
MEMORY = ["model.memory.rows=512", "model.memory.hashes=2"]
NAMES = ["model.names=pairs", "model.head.prior_rank=96"]
SEEING = ["model.head.token_before=true", "model.head.soft_prior=true"]
AGAIN = [
    ["parallel.recompute=full"],
    ["parallel.recompute=head"],
    [*JOINT, "parallel.recompute=head"],
    [*NAMES, "parallel.recompute=head"],
    [*MEMORY, "parallel.recompute=head"],
    [*BITS, "parallel.recompute=full"],
]
SMALL = ["train.micro_batch_size=1", "data.seq_length=128", "model.num_layers=4"]  # bf16 is slow on many CPUs


@pytest.mark.parametrize("preset", ["laptop", "125m"])
@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["train.precision=fp32"],
        ["model.qk_norm=false"],
        ["model.head_dim=128"],
        SOFTMAX,
        JOINT,
        BITS,
        NAMES,
        [*JOINT, "model.names=pairs"],
        [*JOINT, "diffusion.levels_apart=2", "parallel.recompute=head"],
        ["diffusion.noisy_every=2"],
        ["diffusion.noisy_every=1", "model.names=sum", "parallel.recompute=head"],
        [*JOINT, *SEEING, "model.names=pairs", "diffusion.levels_apart=3"],
        MEMORY,
        [*JOINT, *MEMORY],
        [*BITS, *MEMORY],
        [*SOFTMAX, *MEMORY],
        *AGAIN,
    ],
    ids=lambda extra: ",".join(extra),
)
def test_parameters_and_activations(preset: str, extra: list[str]) -> None:
    config = load_config(preset=preset, overrides=[*SMALL, *extra])
    model = build_model(config, 4096, world.of_one(), eos_id=2)[0]
    if config.train.precision == "bf16":
        model.bfloat16()
    named = dict(model.named_parameters())
    counts = parameter_counts(config)
    for part, count in counts.items():
        assert count == sum(p.numel() for name, p in named.items() if name.startswith(f"{part}.")), part
    assert sum(counts.values()) == sum(p.numel() for p in named.values())

    batch = TokenBatch(torch.randint(0, 4096, (1, 128)), torch.arange(1))
    saved = Saved(named.values())
    with saved:
        output: Any = model(batch)
        output.loss.backward()
    estimate = memory_per_rank(config, ParallelDims.build(config, 1))["activations"]
    assert estimate == pytest.approx(saved.peak, rel=0.1)


def test_zero_and_tp_divide_memory() -> None:
    def parts(world: int, **parallel: Any) -> dict[str, float]:
        config = load_config(preset="1b", overrides=[f"parallel.{k}={v}" for k, v in parallel.items()])
        return memory_per_rank(config, ParallelDims.build(config, world))

    one = parts(1, zero_stage=1)
    assert parts(8, zero_stage=1)["optimizer"] == pytest.approx(one["optimizer"] / 8)
    assert parts(8, zero_stage=1)["gradients"] == one["gradients"]
    assert parts(8, zero_stage=2)["gradients"] == pytest.approx(one["gradients"] / 8)
    assert parts(8, zero_stage=3)["weights"] == pytest.approx(one["weights"] / 8)
    assert parts(8, tp=8)["activations"] < one["activations"] / 6
    assert parts(1, recompute="full")["activations"] < one["activations"] / 2


def test_the_softmax_head_counts() -> None:
    """It moves layers away from the last stage, and is split over TP with the table."""
    base = ["model.head.kind=softmax", "model.block_size=1", "parallel.pp=2"]

    def plan(vocab_size: int, *extra: str) -> dict[str, Any]:
        return describe(load_config(preset="125m", overrides=[*base, f"model.vocab_size={vocab_size}", *extra]), 4)

    small, large = plan(1), plan(200_000)
    assert [c["holds"] for c in small["layout"]["chunks"]] == ["embedding + 8 layers", "8 layers + head"]
    assert [c["holds"] for c in large["layout"]["chunks"]] == ["embedding + 15 layers", "1 layers + head"]
    assert small["parameters"]["head"] == 128 * 768
    assert large["parameters"]["embedding"] == large["parameters"]["head"] == 200_064 * 768
    split = plan(200_000, "parallel.tp=2", "parallel.zero_stage=0")["memory_bytes_per_rank"]
    assert split["optimizer"] < 0.52 * plan(200_000, "parallel.zero_stage=0")["memory_bytes_per_rank"]["optimizer"]


def test_a_softmax_plan_has_to_know_the_vocabulary(tiny_data: Path) -> None:
    base = ["model.head.kind=softmax", "model.block_size=1"]
    with pytest.raises(UserError, match=r"data.path=DIR, or for example model.vocab_size=32000"):
        describe(load_config(preset="laptop", overrides=base), 1)
    found = describe(load_config(preset="laptop", overrides=[*base, f"data.path={tiny_data}"]), 1)
    assert found["parameters"]["head"] == 512 * 256
    with pytest.raises(UserError, match=r"the data has a vocabulary of 421 tokens; .* model.vocab_size=421"):
        describe(load_config(preset="laptop", overrides=[*base, f"data.path={tiny_data}", "model.vocab_size=7"]), 1)


def test_the_rendered_plan_names_every_chunk() -> None:
    plan = describe(load_config(preset="laptop", overrides=["parallel.tp=2", "parallel.pp=2"]), 4)
    text = render(plan)
    assert len(plan["layout"]["chunks"]) == 2 and text.count("pp rank") == 2
    assert "head" in plan["layout"]["chunks"][-1]["holds"]
    assert f"{plan['parameters']['total']:,}" in text
