"""`--dry-run`: what a configuration means, worked out without torch: parameters, memory, layout."""

from __future__ import annotations

from typing import Any

from megatron_bit.config import Config
from megatron_bit.data.manifest import load_manifest
from megatron_bit.errors import UserError
from megatron_bit.parallel.dims import ParallelDims
from megatron_bit.parallel.split import FREQUENCIES, head_flops, head_passes, layer_flops, split_layers, train_flops


def parameter_counts(config: Config) -> dict[str, int]:
    """Parameters of the unsharded model, by part. A test holds them against the built model."""
    m, h = config.model, config.model.head
    d, w = m.hidden_size, h.hidden_size
    attention = 2 * d * (m.query_width + m.kv_width) + (2 * m.attention_head_dim if m.qk_norm else 0)
    layer = attention + 3 * d * m.ffn_hidden_size + 2 * d
    if h.kind == "softmax":
        table = m.padded_vocab_size * d
        return {"embedding": table, "backbone": m.num_layers * layer + d, "head": table}
    rows = 1 + (m.block_size > 1)  # a token's own state, and the last of its block
    head = h.num_layers * (4 * w * w + 3 * w * h.ffn_hidden_size) + m.block_size * w + rows * d * w
    head += w * 6 * w + 6 * w + w * 2 * w + 2 * w  # modulation
    head += (w + rows * d * h.prior) * m.head_outputs
    if h.kind == "chain":
        head += 2 * m.group_values * w + len(m.group_sizes) * w
    else:
        head += m.bits * w * (2 if config.diffusion.self_condition else 1)
        head += FREQUENCIES * w + w + w * w + w + (m.group_values * w if m.group_bits > 1 else 0)
    read = m.group_values * d if m.group_bits > 1 else m.bits * d + d * d
    return {"embedding": m.block_size * d + read + d, "backbone": m.num_layers * layer + d, "head": head}


def table_parameters(config: Config) -> int:
    """Of these, rows for tokens or for values of groups and the projections onto them: what is called embeddings."""
    m, h = config.model, config.model.head
    d, w = m.hidden_size, h.hidden_size
    if h.kind == "softmax":
        return 2 * m.padded_vocab_size * d
    if h.kind == "diffusion" and m.group_bits == 1:
        return 0
    projections = (w + (1 + (m.block_size > 1)) * d * h.prior) * m.head_outputs
    return projections + m.group_values * ((m.group_bits > 1) * d + (2 if h.kind == "chain" else 1) * w)


def memory_per_rank(config: Config, dims: ParallelDims) -> dict[str, float]:
    """Estimated bytes on the fullest rank: weights, gradients, optimizer, activations.

    Activations are those of the micro-batches in flight: 1F1B holds up to pp of them. An estimate.
    """
    counts = parameter_counts(config)
    split = split_layers(config, dims.num_chunks)
    per_layer = counts["backbone"] / config.model.num_layers
    width = 2 if config.train.precision == "bf16" else 4
    states = 12 if config.optim.ema_decay else 8  # bytes of moments and average; masters of bf16 come on top
    softmax = config.model.head.kind == "softmax"
    stages = []
    for stage in range(dims.pp):
        mine = range(stage, dims.num_chunks, dims.pp)
        layers = sum(split[chunk] for chunk in mine)
        parameters = layers * per_layer / dims.tp
        parameters += counts["embedding"] / (dims.tp if softmax else 1) if stage == 0 else 0
        last = stage == dims.pp - 1
        parameters += counts["head"] / dims.tp if last else 0
        flight = min(dims.pp - stage, dims.micro_batches(config)) if dims.pp > 1 else 1
        stages.append(
            {
                "weights": parameters * width / (dims.dp if dims.zero_stage == 3 else 1),
                "gradients": parameters * 4 / (dims.dp if dims.zero_stage > 1 else 1),
                "optimizer": parameters * (states + (4 if width == 2 else 0)) / (dims.dp if dims.zero_stage else 1),
                "activations": _activations(config, dims, layers, flight, last, width),
            }
        )
    return max(stages, key=lambda parts: sum(parts.values()))


def _activations(config: Config, dims: ParallelDims, layers: int, flight: int, last: bool, width: int) -> float:
    """Bytes that autograd keeps, counted tensor by tensor in the unfused modules.

    Under sequence parallelism what lies outside the tensor-parallel regions is split over TP too. A test holds the
    sum against the tensors saved by a real forward pass.
    """
    m, h = config.model, config.model.head
    d, q, kv, w = m.hidden_size, m.query_width, m.kv_width, h.hidden_size
    tokens = config.train.micro_batch_size * config.data.seq_length
    shared = dims.tp if dims.sequence_parallel else 1
    # two norms with inputs and outputs | queries, keys, values before and after norm and RoPE, attention, SwiGLU
    layer = (
        4 * d / shared + ((5 if m.qk_norm else 4) * q + (4 if m.qk_norm else 3) * kv + 3 * m.ffn_hidden_size) / dims.tp
    )
    head_layer = 6 * w / shared + (5 * w + 3 * h.ffn_hidden_size) / dims.tp
    ends = 14 * w / shared + 10 * m.bits * (4 / width) / shared
    head = config.head_evaluations * (h.num_layers * head_layer + ends)
    if h.kind == "softmax":  # final norm, and the probabilities in float32
        head = 2 * d / shared + m.padded_vocab_size / dims.tp * (4 / width)
    head = head if last else 0.0
    if config.parallel.recompute == "full":  # inputs of layers stay; the head, and later one layer at a time, is whole
        return tokens * width * (flight * layers * d / shared + max(head, layer if layers else 0.0))
    return tokens * width * (flight * layers * layer + head)


def describe(config: Config, world_size: int) -> dict[str, Any]:
    """Everything `--dry-run` shows, as plain data; UserError if the layout does not fit."""
    config = _with_vocabulary(config)
    dims = ParallelDims.build(config, world_size)
    counts = parameter_counts(config)
    split = split_layers(config, dims.num_chunks)
    memory = memory_per_rank(config, dims)
    tokens = config.train.global_batch_size * config.data.seq_length
    stages = []
    for chunk, layers in enumerate(split):
        parts = (["embedding"] if chunk == 0 else []) + ([f"{layers} layers"] if layers else [])
        stages.append(
            {
                "chunk": chunk,
                "pp_rank": chunk % dims.pp,
                "holds": " + ".join(parts + (["head"] if chunk == dims.num_chunks - 1 else [])),
            }
        )
    return {
        "config": config.model_dump(mode="json"),
        "parameters": {**counts, "total": sum(counts.values())},
        "layout": {
            "world_size": world_size,
            "tp": dims.tp,
            "pp": dims.pp,
            "dp": dims.dp,
            "vpp": dims.vpp,
            "sequence_parallel": dims.sequence_parallel,
            "zero_stage": dims.zero_stage,
            "micro_batches": dims.micro_batches(config),
            "chunks": stages,
        },
        "memory_bytes_per_rank": {**{k: round(v) for k, v in memory.items()}, "total": round(sum(memory.values()))},
        "tokens_per_step": tokens,
        "tokens_of_run": tokens * config.train.steps,
        "train_flops_per_token": train_flops(config),
        "head_cost_in_layers": round(head_passes(config) * head_flops(config) / layer_flops(config), 2),
    }


def _with_vocabulary(config: Config) -> Config:
    """The configuration with the vocabulary that a softmax head has to know: of the data, if there is some."""
    if config.model.head.kind != "softmax" or (config.model.vocab_size is not None and not config.data.folders[0]):
        return config
    if not config.data.folders[0]:
        raise UserError(
            "a softmax head is as large as the vocabulary: give data.path=DIR, or for example model.vocab_size=32000"
        )
    manifest = load_manifest(config.data.folders[0], check_files=False)
    manifest.need_vocabulary("model.head.kind=softmax")
    return config.with_vocab_size(manifest.vocab_size)


def render(plan: dict[str, Any]) -> str:
    """The plan for a person."""
    layout, memory, parameters = plan["layout"], plan["memory_bytes_per_rank"], plan["parameters"]
    lines = [
        "parameters  " + ", ".join(f"{name} {value:,}" for name, value in parameters.items()),
        f"layout      {layout['world_size']} ranks = TP {layout['tp']} x PP {layout['pp']} x DP {layout['dp']}"
        + (f", VPP {layout['vpp']}" if layout["vpp"] > 1 else "")
        + (", sequence parallel" if layout["sequence_parallel"] else "")
        + f", ZeRO-{layout['zero_stage']}, {layout['micro_batches']} micro-batches a step",
    ]
    lines += [f"  pp rank {c['pp_rank']}, chunk {c['chunk']}: {c['holds']}" for c in layout["chunks"]]
    lines += [
        "memory      "
        + ", ".join(f"{name} {value / 2**30:.2f} GiB" for name, value in memory.items())
        + " (estimate, fullest rank)",
        f"compute     {plan['train_flops_per_token'] / 1e9:.3f} GFLOP a token; "
        f"the head costs as much as {plan['head_cost_in_layers']} layers",
        f"data        {plan['tokens_per_step']:,} tokens a step, {plan['tokens_of_run']:,} in the run",
    ]
    return "\n".join(lines)
