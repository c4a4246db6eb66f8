"""How long a step takes, worked out from sizes: see docs/planning.md for what is assumed and how well it holds.

All collectives are rings: an all-gather or a reduce-scatter of a tensor over n ranks moves (n - 1) / n of its bytes
through each rank's link, an all-reduce twice that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megatron_bit.config import Config
from megatron_bit.parallel.dims import BUCKET, ParallelDims
from megatron_bit.parallel.split import head_passes, split_layers, train_flops
from megatron_bit.planning.hardware import Hardware, Precision
from megatron_bit.planning.operations import Work, embedding_work, head_work, layer_work
from megatron_bit.planning.parameters import local_parameters

REPLICATED_BUCKET = 2**25  # elements that ZeRO-0 reduces together (optim/replicated.py, which imports torch)


@dataclass(frozen=True)
class Overlap:
    """What communication runs beside computation. The defaults are what this system does."""

    tensor: bool = False  # a layer's collectives beside its products (Megatron's --tp-comm-overlap)
    gradients: bool = False  # the reduction beside the last backward pass, weights gathered beside the first forward


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest pipeline stage, which add up to the step."""

    backbone: float
    head: float
    tensor: float  # TP communication that nothing hides
    pipeline: float  # bubble, and sends that nothing hides
    data: float  # DP communication that nothing hides
    optimizer: float  # AdamW, and gradients of micro-batches added up

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


def step_time(
    config: Config, dims: ParallelDims, hardware: Hardware, gpus_per_node: int, overlap: Overlap = Overlap()
) -> StepTime:
    """Predict a training step. UserError if the hardware does not have the precision."""
    precision = hardware.precision(config.train.precision)
    width = 4 if precision == "fp32" else 2
    micro_batches, split = dims.micro_batches(config), split_layers(config, dims.num_chunks)
    again = 1.0 if config.parallel.recompute == "full" else 0.0
    again_head = 1.0 if config.recompute_head else 0.0
    layer = _passes(layer_work(config, dims), hardware, precision, width, 3.0 + again)
    head_precision: Precision = "bf16" if precision == "fp8" else precision
    head = _passes(head_work(config, dims), hardware, head_precision, width, 3.0 * head_passes(config) + again_head)
    embedding = _passes(embedding_work(config, dims), hardware, head_precision, width, 3.0)
    moved = _collectives(layer_work(config, dims), dims, hardware, width, 2.0 + again)
    moved_input = _collectives(embedding_work(config, dims), dims, hardware, width, 2.0)
    moved_head = _collectives(head_work(config, dims), dims, hardware, width, 2.0 * head_passes(config) + again_head)
    if overlap.tensor:
        moved, moved_head = max(0.0, moved - layer), max(0.0, moved_head - head)
        moved_input = max(0.0, moved_input - embedding)

    stages = []
    for stage in range(dims.pp):
        layers = sum(split[stage :: dims.pp])
        first, last = float(stage == 0), float(stage == dims.pp - 1)
        tensor = first * moved_input + layers * moved + last * moved_head
        stages.append((layers * layer + first * embedding, last * head, tensor))
    slowest = max(range(dims.pp), key=lambda stage: sum(stages[stage]))
    busy = sum(stages[slowest])
    bubble = (sum(map(sum, stages)) - busy) / dims.vpp
    send = _send(config, dims, hardware, gpus_per_node, width) if dims.vpp == 1 else 0.0  # interleaved: hidden
    parameters = _parameters(config, dims, split, slowest)
    reduce, beside = _data_parallel(
        dims, hardware, gpus_per_node, parameters, sum(split[slowest :: dims.pp]), width, micro_batches
    )
    hidden = min(beside, micro_batches * busy * 2.0 / 3.0)
    if overlap.gradients:  # interleaved, a chunk's gradients are reduced while the other chunks go backward
        hidden += min(reduce, busy * (1.0 + (dims.pp - 1) * (dims.vpp - 1) / dims.vpp))
    backbone, head_seconds, tensor = (micro_batches * part for part in stages[slowest])
    return StepTime(
        backbone=backbone,
        head=head_seconds,
        tensor=tensor,
        pipeline=bubble + micro_batches * send,
        data=reduce + beside - hidden,
        optimizer=_optimizer(config, dims, hardware, parameters, width, micro_batches),
    )


def utilization(config: Config, dims: ParallelDims, hardware: Hardware, seconds: float) -> float:
    """MFU: FLOPs that the model needs (causal attention half, nothing for recomputation) over the peak."""
    peak = hardware.peak_flops[hardware.precision(config.train.precision)]
    tokens = config.train.global_batch_size * config.data.seq_length
    return train_flops(config) * tokens / (seconds * dims.world_size * peak)


def _passes(work: Work, hardware: Hardware, precision: Precision, width: int, passes: float) -> float:
    """Seconds of `passes` forward passes' work; a backward pass is two.

    A product is limited by FLOPs or by bytes, and takes `kernel_seconds` more. Attention recomputes its scores in the
    backward pass: 2.5 forward passes instead of 2.
    """
    seconds = work.elements * width * passes / hardware.copy_bandwidth
    rate = hardware.attainable(precision)
    for product in work.products:
        if product.flops:
            once = max(product.flops / rate, product.elements * width / hardware.copy_bandwidth)
            seconds += passes * (once + product.count * hardware.kernel_seconds)
    attention = hardware.peak_flops["bf16" if precision == "fp8" else precision] * hardware.attention_efficiency
    return seconds + (passes + 0.5) * work.attention_flops / attention


def _collectives(work: Work, dims: ParallelDims, hardware: Hardware, width: int, passes: float) -> float:
    """Seconds of TP communication; a backward pass moves as much as a forward pass."""
    share = (dims.tp - 1) / dims.tp * width / hardware.intra_bandwidth
    return passes * work.collectives * (work.collective_elements * share + hardware.intra_latency)


def _parameters(config: Config, dims: ParallelDims, split: list[int], stage: int) -> float:
    local = local_parameters(config, dims.tp)
    parameters = sum(split[stage :: dims.pp]) * local["layer"] + (local["embedding"] if stage == 0 else 0.0)
    return parameters + (local["head"] if stage == dims.pp - 1 else 0.0)


def _send(config: Config, dims: ParallelDims, hardware: Hardware, gpus_per_node: int, width: int) -> float:
    """Seconds of a micro-batch's activations to the next stage, and of their gradients back."""
    if dims.pp == 1:
        return 0.0
    shared = dims.tp if dims.sequence_parallel else 1
    sent = config.train.micro_batch_size * config.data.seq_length * config.model.hidden_size * width / shared
    inside = dims.world_size <= gpus_per_node
    bandwidth = hardware.intra_bandwidth if inside else hardware.inter_bandwidth
    return 2.0 * (sent / bandwidth + (0.0 if inside else hardware.inter_latency) + hardware.kernel_seconds)


def _data_parallel(
    dims: ParallelDims,
    hardware: Hardware,
    gpus_per_node: int,
    parameters: float,
    layers: int,
    width: int,
    micro_batches: int,
) -> tuple[float, float]:
    """Seconds of communication over DP: (once a step, during the backward passes).

    ZeRO-0 and 1 all-reduce float32 gradients once a step, ZeRO-1 and 2 gather the updated weights. ZeRO-2 reduces the
    gradients of each micro-batch while its backward pass runs, and ZeRO-3 also gathers each layer in both passes.
    The latency of an all-reduce grows with the logarithm of the nodes (trees), that of a gather with their number.
    """  # fmt: skip
    if dims.dp == 1:
        return 0.0, 0.0
    inside = dims.tp * dims.dp <= gpus_per_node
    neighbours = min(dims.dp, max(1, gpus_per_node // dims.tp))  # of one group on one node, each with its own card
    nodes = 1 if inside else -(-dims.dp // neighbours)
    bandwidth = hardware.intra_bandwidth
    if not inside:
        bandwidth = min(bandwidth, hardware.inter_bandwidth * neighbours)
    share = (dims.dp - 1) / dims.dp / bandwidth
    ring = hardware.intra_latency + (nodes - 1) * hardware.inter_latency
    tree = hardware.intra_latency + 2.0 * math.log2(nodes) * hardware.inter_latency
    gather = parameters * width * share
    if dims.zero_stage == 0:
        return 2.0 * parameters * 4 * share + math.ceil(parameters / REPLICATED_BUCKET) * tree, 0.0
    if dims.zero_stage == 1:
        return 2.0 * parameters * 4 * share + math.ceil(parameters / BUCKET) * tree + gather + ring, 0.0
    if dims.zero_stage == 2:
        return gather + ring, micro_batches * (gather + math.ceil(parameters / BUCKET) * ring)
    return 0.0, 3.0 * micro_batches * (gather + (layers + 1) * ring)


def _optimizer(
    config: Config, dims: ParallelDims, hardware: Hardware, parameters: float, width: int, micro_batches: int
) -> float:
    """Seconds of AdamW, and of adding each micro-batch's gradients to their float32 sum (of ZeRO-2 and 3: a part).

    AdamW reads master, two moments and gradient, writes all but the last and the weights; the norm reads gradients.
    """
    mine = parameters / (dims.dp if dims.zero_stage else 1)
    summed = parameters * (width + 8 / (dims.dp if dims.zero_stage > 1 else 1)) * micro_batches
    states = 4 * 4 + 3 * 4 + width + 4 + (12 if config.optim.ema_decay else 0)
    return (mine * states + summed) / hardware.copy_bandwidth
