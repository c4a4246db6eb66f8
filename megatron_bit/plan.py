"""`--dry-run`: what a configuration means, worked out without torch: parameters, memory, layout."""

from __future__ import annotations

from typing import Any

from megatron_bit import trust
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


def local_parameters(config: Config, tp: int) -> dict[str, float]:
    """Parameters that one tensor-parallel rank holds: of the embedding, of one layer, of the last norm, of the head.

    Split over TP are the matrices of layers (of backbone and head) and a softmax model's tables; the rest is whole.
    """
    m, h = config.model, config.model.head
    counts = parameter_counts(config)
    norms = 2 * m.hidden_size + (2 * m.attention_head_dim if m.qk_norm else 0)
    layer = (counts["backbone"] - m.hidden_size) // m.num_layers
    embedding, head = counts["embedding"], counts["head"]
    split = h.num_layers * (4 * h.hidden_size**2 + 3 * h.hidden_size * h.ffn_hidden_size)
    if h.kind == "softmax":
        embedding, split = embedding / tp, head
    return {
        "embedding": embedding,
        "layer": norms + (layer - norms) / tp,
        "norm": m.hidden_size,
        "head": head - split + split / tp,
    }


def describe(config: Config, world_size: int) -> dict[str, Any]:
    """Everything `--dry-run` shows, as plain data; UserError if the layout does not fit."""
    from megatron_bit.planning.memory import memory_per_rank  # which counts parameters here

    config = with_vocabulary(config)
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


def with_vocabulary(config: Config) -> Config:
    """The configuration with the vocabulary that a softmax head has to know: of the data, if there is some."""
    if config.model.head.kind != "softmax" or (config.model.vocab_size is not None and not config.data.folders[0]):
        return config
    if not config.data.folders[0]:
        raise UserError(
            "a softmax head is as large as the vocabulary: give data.path=DIR, or for example model.vocab_size=32000"
        )
    trust.check()
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
