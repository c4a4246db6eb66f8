"""No step makes the host wait for the device, but for what is listed here with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import host_syncs
import pytest
import tiny_runs
from gloo_ranks import run_ranks

LOG = {"training/trainer.py:settle tolist": 1}  # losses and votes of the step before, whose kernels are done
OURS = {**LOG, "training/trainer.py:settle _local_scalar_dense": 1}  # and whether it was skipped
# DeepSpeed's host decides whether an update is skipped: a wait between the backward pass and the update
ZERO = {**LOG, "runtime/utils.py:is_invalid_grad_norm _local_scalar_dense": 1}
BF16_ZERO = {**ZERO, "zero/stage_1_and_2.py:has_overflow _local_scalar_dense": 1}
# megatron-core's cross-entropy assigns by a mask: index_put_ of one value for all, which waits for nothing
SOFTMAX = {**OURS, "tensor_parallel/cross_entropy.py:calculate_predicted_logits index_put_": 8}

CHAIN = {
    "model.head.kind": "chain", "model.group_bits": 5, "data.document_boundaries": "mask", "data.align_blocks": True,
}  # fmt: skip
FP8 = {
    "train.precision": "fp8_emulated", "fp8.recipe": "delayed", "model.hidden_size": 64, "model.ffn_hidden_size": 96,
    "model.head.hidden_size": 64, "model.head.ffn_hidden_size": 64, "data.seq_length": 48,
}  # fmt: skip


CASES: dict[str, tuple[int, dict[str, Any], dict[str, int]]] = {
    "bf16_ema": (1, {"train.precision": "bf16", "optim.ema_decay": 0.9}, OURS),
    "chain": (1, CHAIN, OURS),
    "noisy": (1, {**CHAIN, "diffusion.noisy_every": 2, "model.memory.rows": 20}, OURS),
    "groups": (1, {"model.group_bits": 3, "diffusion.self_condition": 0.5, "diffusion.context_noise": 0.1}, OURS),
    "measured": (1, {"diffusion.noise": "entropy_rate", "diffusion.condition_drop": 0.1}, OURS),
    "softmax": (1, {"model.head.kind": "softmax", "model.block_size": 1}, SOFTMAX),
    "fp8": (1, FP8, OURS),
    "tp2_pp2": (4, {"parallel.tp": 2, "parallel.pp": 2}, OURS),
    "pp2_interleaved_recompute": (2, {"parallel.pp": 2, "parallel.vpp": 2, "parallel.recompute": "full"}, OURS),
    "dp2_zero0": (2, {"parallel.zero_stage": 0}, OURS),
    "pp2_zero1": (2, {"parallel.pp": 2, "parallel.zero_stage": 1}, ZERO),
    "dp2_zero2_bf16": (2, {"parallel.zero_stage": 2, "train.precision": "bf16"}, BF16_ZERO),
    "dp2_zero3": (2, {"parallel.zero_stage": 3}, ZERO),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_nothing_else(name: str, tiny_data: Path, tmp_path: Path) -> None:
    world, settings, waits = CASES[name]
    arguments = tiny_runs.overrides(tmp_path / "run", tiny_data, {"train.steps": 3, **settings})
    for found in run_ranks(host_syncs.train, world, arguments):
        assert found == waits
