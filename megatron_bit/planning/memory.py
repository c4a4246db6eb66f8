"""Bytes that a rank holds in training, counted tensor by tensor. Imports no torch.

Tests hold the counts against real steps over real processes: what stays (weights, gradients, optimizer) and what
autograd keeps, under ZeRO 0 to 3, TP with and without sequence parallelism, recomputation, 1F1B and the interleaved
schedule. Not in it: the allocator's fragmentation, NCCL's own buffers, and temporaries inside a layer.
"""

from __future__ import annotations

import functools

from megatron_bit.config import Config
from megatron_bit.parallel.dims import BUCKET, ParallelDims
from megatron_bit.parallel.split import FREQUENCIES, noisy_blocks, split_layers
from megatron_bit.planning.parameters import local_parameters

MAX_LIVE = 1e9  # elements: DeepSpeed's `stage3_max_live_parameters`


def memory_per_rank(config: Config, dims: ParallelDims, overlap: bool = True) -> dict[str, float]:
    """Bytes on the fullest rank, by part. See `memory_of_stages`."""
    return max(memory_of_stages(config, dims, overlap), key=lambda parts: sum(parts.values()))


def memory_of_stages(config: Config, dims: ParallelDims, overlap: bool = True) -> list[dict[str, float]]:
    """Bytes on a rank of each pipeline stage: weights, gradients, optimizer, buffers of ZeRO, activations.

    Args:
        overlap: DeepSpeed reduces gradients while the backward pass runs, as it does on GPUs: a second bucket.
    """
    local, split = local_parameters(config, dims.tp), split_layers(config, dims.num_chunks)
    width = 4 if config.train.precision == "fp32" else 2
    masters = 4 if width == 2 or dims.zero_stage else 0
    states = (12 if config.optim.ema_decay else 8) + masters  # moments, average, fp32 masters
    stages = []
    for stage in range(dims.pp):
        layers = [split[chunk] for chunk in range(stage, dims.num_chunks, dims.pp)]
        last = stage == dims.pp - 1
        parameters = sum(layers) * local["layer"] + (local["embedding"] if stage == 0 else 0.0)
        parameters += local["head"] + local["norm"] if last else 0.0
        stages.append(
            {
                "weights": parameters * width / (dims.dp if dims.zero_stage == 3 else 1),
                "gradients": parameters * 4 / (dims.dp if dims.zero_stage > 1 else 1),
                "optimizer": parameters * states / (dims.dp if dims.zero_stage else 1),
                "buffers": _buffers(dims, parameters, width, overlap),
                "activations": _activations(config, dims, stage, layers, width),
            }
        )
    return stages


def _buffers(dims: ParallelDims, parameters: float, width: int, overlap: bool) -> float:
    """DeepSpeed's buckets, and at ZeRO-3 the weights that are gathered.

    ZeRO-1 in bf16 is its BF16_Optimizer, which reduces the flat gradients where they are.
    """
    if dims.zero_stage == 3:
        return min(parameters, BUCKET) * width + min(parameters, MAX_LIVE) * width
    if dims.zero_stage == 2 or (dims.zero_stage == 1 and width == 4 and dims.pp == 1):
        return min(parameters, BUCKET) * width * (2 if overlap else 1)
    return 0.0


def _most_kept(dims: ParallelDims, stage: int, chunks: tuple[float, ...], micro_batches: int) -> float:
    """The most that a stage keeps at once if a micro-batch in each of its chunks keeps `chunks`.

    1F1B: one micro-batch for each stage from here on.
    """
    if dims.vpp == 1:
        return min(dims.pp - stage, micro_batches) * chunks[0]
    return _interleaved(dims.pp, stage, chunks, min(micro_batches, 3 * dims.pp))


@functools.lru_cache(maxsize=4096)
def _interleaved(pp: int, stage: int, chunks: tuple[float, ...], micro_batches: int) -> float:
    """The same of megatron-core's interleaved schedule: warm-up, then a forward and a backward pass in turn.

    Forward passes go through the chunks in groups of pp micro-batches, backward passes the other way round.
    """
    order = [chunk for _ in range(micro_batches // pp) for chunk in range(len(chunks)) for _ in range(pp)]
    warmup = min((pp - stage - 1) * 2 + (len(chunks) - 1) * pp, len(order))
    kept = most = sum(chunks[chunk] for chunk in order[:warmup])
    for forward, backward in zip(order[warmup:], order, strict=False):
        kept += chunks[forward]
        most = max(most, kept)
        kept -= chunks[-1 - backward]
    return most


def layer_activations(config: Config, dims: ParallelDims) -> float:
    """Elements that autograd keeps of one backbone layer for one token on one rank.

    Two norms with inputs and outputs | queries, keys, values before and after norm and RoPE, attention, SwiGLU.
    Under sequence parallelism what lies outside the tensor-parallel regions is split over TP too.
    """
    m = config.model
    d, q, kv = m.hidden_size, m.query_width, m.kv_width
    shared = dims.tp if dims.sequence_parallel else 1
    inside = (5 if m.qk_norm else 4) * q + (4 if m.qk_norm else 3) * kv + 3 * m.ffn_hidden_size
    return 4 * d / shared + inside / dims.tp


def _noisy_share(config: Config, dims: ParallelDims) -> float:
    """Blocks that a rank evaluates once more with noise, for each of its own: `config.noisy_share`, rounded up to whole
    blocks of a rank's part of the sequence."""
    if not config.noisy_every:
        return 0.0
    blocks, shards = config.data.seq_length // config.model.block_size, dims.tp if dims.sequence_parallel else 1
    return noisy_blocks(config.noisy_every, blocks, shards) * shards / blocks


def head_activations(config: Config, dims: ParallelDims, width: int) -> float:
    """Elements of the activations' width that autograd keeps of the head for one token on one rank."""
    m, h = config.model, config.model.head
    shared = dims.tp if dims.sequence_parallel else 1
    if h.kind == "softmax":  # final norm, and the probabilities in float32
        return 2 * m.hidden_size / shared + m.padded_vocab_size / dims.tp * (4 / width)
    layer = 6 * h.hidden_size / shared + (5 * h.hidden_size + 3 * h.ffn_hidden_size) / dims.tp
    if h.kind == "chain":  # log-probabilities of a stage's own group in float32
        ends = 14 * h.hidden_size + m.head_outputs / len(m.group_sizes) * (4 / width)
    else:  # log-probabilities and two kinds of probabilities in float32; which values the noisy bits allow
        values = m.head_outputs * (3 * 4 / width + 1) if m.group_bits > 1 else 0
        ends = 12 * h.hidden_size + m.bits * (1 + 4 / width) + values
    names, remembered = _pairs(config, h.hidden_size), 0.0
    if h.kind == "chain":
        names, remembered = 0.0, len(m.group_sizes) * _remembered(config, width)
    if share := _noisy_share(config, dims):  # with keys and values of the window before each block, gathered for it
        windows = 4 * h.hidden_size * ((h.window - 1 + m.block_size) / m.block_size - 2) / dims.tp
        layer += share * (layer + windows)
        ends *= 1.0 + share
        remembered *= 1.0 + share
    each = h.num_layers * layer + (ends + names) / shared
    return config.head_evaluations * each + _once(config, dims, width) + remembered


def _once(config: Config, dims: ParallelDims, width: int) -> float:
    """Of a chain what is not for each evaluation, and is not computed again: names of the tokens before, ties; of noisy
    blocks what is likely (in float32 as well) and what is told of its noise."""
    m, w, groups = config.model, config.model.head.hidden_size, len(config.model.group_sizes)
    if m.head.kind != "chain":
        return 0.0
    once = _pairs(config, w) + (2 * groups + 1) * m.prior_rank
    if share := _noisy_share(config, dims):
        seen = m.head_outputs * (1 + 3 * 4 / width) + groups * (FREQUENCIES + 3 * w)
        once += share * (once + seen)
    return once / (dims.tp if dims.sequence_parallel else 1)


def _pairs(config: Config, width: int) -> float:
    """Elements kept of the products over pairs of groups for one token: factors, their sums, the map's input."""
    return 2 * width * (2 * len(config.model.group_sizes) + 1) if config.model.pairs else 0.0


def _remembered(config: Config, width: int) -> float:
    """The same of looking up n-grams: rows (int64) and which are this rank's, of the whole sequence on every rank."""
    return config.model.memory.tables * 9 / width if config.model.memory.rows else 0.0


def head_inputs(config: Config, dims: ParallelDims, width: int) -> float:
    """Elements kept of a head that is computed again: what its evaluations begin with, for one token on one rank."""
    m, shared = config.model, dims.tp if dims.sequence_parallel else 1
    if m.head.kind == "chain":  # inputs of all stages, values of groups (int64), logits of the prior
        groups = len(m.group_sizes)
        kept = (groups * m.head.hidden_size + groups * 8 / width + m.head_outputs * m.head.prior) / shared
        share = _noisy_share(config, dims)
        if share:  # and the states; of what tells the stages apart there is one more for each
            kept += share * (kept + m.hidden_size / shared)
            kept += (1 + share) * groups * m.head.hidden_size / shared
        return kept + groups * _remembered(config, width) * (1.0 + share)
    # noisy bits; terms of the loss
    return config.head_evaluations * (m.bits + 3) * (4 / width) / shared


def _activations(config: Config, dims: ParallelDims, stage: int, layers: list[int], width: int) -> float:
    full = config.parallel.recompute == "full"  # then inputs of layers stay, and in a backward pass one layer is whole
    width_of_inputs = config.model.hidden_size / (dims.tp if dims.sequence_parallel else 1)
    layer = layer_activations(config, dims)
    chunks = [count * (width_of_inputs if full else layer) for count in layers]
    if stage == 0 and config.model.head.kind != "softmax":
        chunks[0] += width_of_inputs * (3 if config.model.group_bits == 1 else 1)  # the embedding's norm, and MLP
        chunks[0] += _pairs(config, config.model.hidden_size) / (dims.tp if dims.sequence_parallel else 1)
    if stage == 0:
        chunks[0] += _remembered(config, width)
    if full and stage == dims.pp - 1:
        chunks[-1] += 2 * width_of_inputs  # the last norm, which a layer's own count makes up for otherwise
    head = head_activations(config, dims, width) if stage == dims.pp - 1 else 0.0
    stays, passes = head, 0.0  # of the head: with its micro-batch; for one evaluation, in the backward pass
    if head and config.recompute_head:
        once = _once(config, dims, width)
        stays, passes = head_inputs(config, dims, width) + once, (head - once) / config.head_evaluations
    if dims.vpp > 1:
        chunks[-1] += stays
        kept = _most_kept(dims, stage, tuple(chunks), dims.micro_batches(config))
        # the head is gone when a layer comes back
        kept += max(passes, layer - stays if full and any(layers) else 0.0)
    else:
        kept = _most_kept(dims, stage, tuple(chunks), dims.micro_batches(config))
        kept += max(stays + passes, layer if full and any(layers) else 0.0)
    return config.train.micro_batch_size * config.data.seq_length * width * kept
