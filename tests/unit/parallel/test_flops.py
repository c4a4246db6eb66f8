"""The FLOP counts behind MFU, plan and pipeline split, against what torch counts in a real step.

torch counts matrix products alone, as we do. Of attention it knows nothing on a CPU, and elsewhere it counts what a
flash kernel computes: whole scores of a causal mask, and scores twice in the backward pass. Here it is counted as the
convention of MFU says: half of a causal mask, and the backward pass twice the forward.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import world
from torch.utils.flop_counter import FlopCounterMode

from megatron_bit.config import load_config
from megatron_bit.model.build import build_model
from megatron_bit.model.chunk import TokenBatch
from megatron_bit.parallel.split import train_flops

aten: Any = torch.ops.aten
VOCABULARY = 300


def _forward(q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> float:
    batch, heads, rows, d = q
    return 2 * batch * heads * rows * k[2] * (d + v[3]) / (2 if causal else 1)


def _backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dropout: float, causal: bool, **_: Any) -> float:
    return 2 * _forward(q, k, v, dropout, causal)


ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


class _Global:
    """In place of the counter's tracker of modules, which cannot follow one that runs without gradients."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _Global:
        return self

    def __exit__(self, *_: Any) -> None: ...


CHAIN = ["model.head.kind=chain", "model.group_bits=4"]
BITS = ["model.head.kind=diffusion", "model.group_bits=1"]
GROUPS = ["model.head.kind=diffusion", "model.group_bits=5"]
SOFTMAX = ["model.head.kind=softmax", "model.block_size=1"]
ODD = [
    "model.num_layers=3", "model.hidden_size=72", "model.num_heads=6", "model.num_kv_heads=3",
    "model.ffn_hidden_size=100", "model.head.hidden_size=40", "model.head.num_heads=4", "model.head.ffn_hidden_size=52",
    "model.head.num_layers=3", "diffusion.noise_samples=3", "data.seq_length=84", "model.head.window=6",
]  # fmt: skip


@pytest.mark.parametrize(
    "head",
    [
        CHAIN, [*CHAIN, "model.bits=11"], [*CHAIN, "model.head.prior=false", "model.block_size=1"], BITS,
        [*BITS, "model.block_size=2"], [*BITS, "diffusion.self_condition=0.5"], GROUPS,
        [*CHAIN, "model.memory.rows=64"],
        [*CHAIN, "model.names=pairs", "model.head.prior_rank=96"], [*GROUPS, "model.names=pairs"],
        [*GROUPS, "diffusion.levels_apart=2"],
        [*CHAIN, "diffusion.noisy_every=2"], [*CHAIN, "diffusion.noisy_every=1", "model.head.prior=false"],
        [*CHAIN, "diffusion.noisy_every=2", "model.names=pairs", "model.head.prior_rank=96"],
        [*GROUPS, "model.head.token_before=true"], [*GROUPS, "model.head.soft_prior=true"],
        [*GROUPS, "model.head.token_before=true", "model.head.soft_prior=true", "model.names=pairs"],
        [*GROUPS, "diffusion.self_condition=0.5"], [*GROUPS, "model.head.prior=false"], SOFTMAX,
    ],
    ids=lambda head: ",".join(item.rpartition(".")[2] for item in head),
)  # fmt: skip
@pytest.mark.parametrize("shape", [[], ODD], ids=["laptop", "odd"])
def test_counts_of_a_real_step(head: list[str], shape: list[str]) -> None:
    config = load_config(preset="laptop", overrides=["model.bits=12", *shape, *head]).with_vocab_size(VOCABULARY)
    model = build_model(config, VOCABULARY, world.of_one(), eos_id=2)[0]
    size, length = 2, config.data.seq_length
    batch = TokenBatch(torch.randint(0, VOCABULARY, (size, length)), torch.arange(size))
    counter: Any = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    counter.mod_tracker = _Global()
    with counter:
        output: Any = model(batch)
        output.loss.backward()
    assert train_flops(config) * size * length == pytest.approx(counter.get_total_flops(), rel=0.015)
