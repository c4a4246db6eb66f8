"""Work and times: the products are the FLOPs of `parallel/split.py`, and the parts are what they should be by hand."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_bit.config import Config, load_config
from megatron_bit.errors import UserError
from megatron_bit.parallel.dims import ParallelDims
from megatron_bit.parallel.split import embedding_flops, head_flops, layer_flops
from megatron_bit.planning.hardware import load_hardware, peak_flops
from megatron_bit.planning.operations import embedding_work, head_work, layer_work
from megatron_bit.planning.parameters import parameter_counts
from megatron_bit.planning.times import Overlap, step_time, utilization

H100 = load_hardware("h100")
HEADS = {
    "chain": [],
    "names": ["model.names=pairs", "model.head.prior_rank=96"],
    "noisy": ["diffusion.noisy_every=4", "model.names=pairs", "model.head.prior_rank=96"],
    "memory": ["model.memory.rows=4096"],
    "names_joint": ["model.head.kind=diffusion", "model.names=pairs"],
    "seeing_joint": ["model.head.kind=diffusion", "model.head.token_before=true", "model.head.soft_prior=true"],
    "apart_joint": ["model.head.kind=diffusion", "diffusion.levels_apart=3"],
    "bits": ["model.head.kind=diffusion", "model.group_bits=1"],
    "joint": ["model.head.kind=diffusion"],
    "alone": ["model.block_size=1", "model.head.prior=false"],
    "softmax": ["model.head.kind=softmax", "model.block_size=1", "model.vocab_size=50257"],
}


def built(world: int = 1, *extra: str, preset: str = "1b", **parallel: Any) -> tuple[Config, ParallelDims]:
    config = load_config(preset=preset, overrides=[*extra, *(f"parallel.{k}={v}" for k, v in parallel.items())])
    return config, ParallelDims.build(config, world)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tp", [1, 4])
def test_products_are_the_counted_flops(head: str, tp: int) -> None:
    """Under sequence parallelism nothing is computed twice: the ranks of a TP group share all of it."""
    config, dims = built(tp, *HEADS[head], tp=tp, zero_stage=0)
    tokens = config.train.micro_batch_size * config.data.seq_length
    assert tp * layer_work(config, dims).flops == pytest.approx(layer_flops(config) * tokens)
    assert tp * head_work(config, dims).flops == pytest.approx(head_flops(config) * tokens)
    assert tp * embedding_work(config, dims).flops == pytest.approx(embedding_flops(config) * tokens)


def test_without_sequence_parallelism_replicated_work_costs() -> None:
    with_sp, without = built(4, tp=4), built(4, tp=4, sequence_parallel="false")
    assert head_work(*without).flops > head_work(*with_sp).flops
    assert step_time(*without, H100, 8).total > step_time(*with_sp, H100, 8).total


def test_communication_by_hand() -> None:
    config, dims = built(16, tp=8, pp=1, zero_stage=1)
    counts = parameter_counts(config)
    time = step_time(config, dims, H100, 8)
    moved = config.train.micro_batch_size * config.data.seq_length * config.model.hidden_size * 2 * 7 / 8
    a_layer = 8 * (moved / 450e9 + 30e-6)  # forward and backward: two gathers and two scatters each
    assert time.tensor > dims.micro_batches(config) * config.model.num_layers * a_layer
    # ZeRO-1 over two nodes: each of the eight ranks of a node has its own card
    least = sum(counts.values()) / 8 * (2 * 4 + 2) * 1 / 2 / 50e9
    assert least < time.data < 1.5 * least
    inside = step_time(*built(8, tp=1, zero_stage=1), H100, 8)
    slow = H100.model_copy(update={"inter_bandwidth": 1e9})
    assert step_time(*built(8, tp=1, zero_stage=1), slow, 8) == inside, "nothing leaves the node"
    assert step_time(config, dims, slow, 8).data > 20 * time.data


def test_the_bubble_by_hand() -> None:
    """Even stages: (pp - 1) / (vpp m) of the rest, and sends that only 1F1B shows."""
    even = ["model.num_layers=17", "model.head.kind=softmax", "model.block_size=1", "model.vocab_size=128"]
    config, dims = built(4, *even, pp=4, vpp=4, zero_stage=0)
    time = step_time(config, dims, H100, 8)
    m = dims.micro_batches(config)
    assert time.pipeline == pytest.approx((time.backbone + time.head + time.tensor) / m * 3 / 4, rel=0.25)
    plain = step_time(*built(4, *even, pp=4, zero_stage=0), H100, 8)
    assert plain.pipeline > 3 * time.pipeline


def test_recomputation_costs_a_forward_pass() -> None:
    plain, full = step_time(*built(), H100, 8), step_time(*built(1, recompute="full"), H100, 8)
    head = step_time(*built(1, recompute="head"), H100, 8)
    assert head.head == full.head == pytest.approx(4 / 3 * plain.head, rel=0.03)
    assert head.backbone == plain.backbone
    assert full.backbone / plain.backbone == pytest.approx(4 / 3, rel=0.03)


def test_overlap_hides_and_never_adds() -> None:
    config, dims = built(16, tp=8, zero_stage=1)
    shown, hidden = step_time(config, dims, H100, 8), step_time(config, dims, H100, 8, Overlap(True, True))
    assert hidden.tensor < shown.tensor and hidden.data < shown.data
    assert (hidden.backbone, hidden.head, hidden.optimizer) == (shown.backbone, shown.head, shown.optimizer)
    assert 0 < utilization(config, dims, H100, shown.total) < utilization(config, dims, H100, hidden.total) < 1


def test_zero_stages_move_what_they_move() -> None:
    """ZeRO-3 across slow nodes shows what it gathers; faster links hide it again."""
    slow = H100.model_copy(update={"inter_bandwidth": 2e9})
    times = {stage: step_time(*built(16, zero_stage=stage), slow, 8).data for stage in (0, 1, 2, 3)}
    assert times[3] > times[2] > 0 and times[1] > times[0] > 0
    assert step_time(*built(16, zero_stage=3), H100, 8).data == 0


def test_a_precision_that_the_device_lacks() -> None:
    a100 = load_hardware("a100")
    assert a100.precision("fp8_emulated") == "bf16"
    with pytest.raises(UserError, match=r"train.precision fp8 has no peak_flops .* which has bf16, fp32"):
        a100.precision("fp8")


@pytest.mark.parametrize(
    ("device", "peak"),
    [("NVIDIA H200", 989.4e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA B200", 2250e12), ("NVIDIA T4", None)],
)
def test_peak_of_a_device_as_its_driver_calls_it(device: str, peak: float | None) -> None:
    assert peak_flops(device) == peak
