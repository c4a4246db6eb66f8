"""`--dry-run`: what a configuration means, worked out without torch: parameters, memory, layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_bit.config import Config
from megatron_bit.data.fit import check_data
from megatron_bit.data.manifest import FILE_NAME, Manifest, load_manifest
from megatron_bit.errors import UserError
from megatron_bit.io import trust
from megatron_bit.parallel.dims import ParallelDims
from megatron_bit.parallel.split import head_flops, head_passes, layer_flops, split_layers, train_flops
from megatron_bit.planning.memory import memory_per_rank
from megatron_bit.planning.parameters import parameter_counts
from megatron_bit.run import belongings


def describe(config: Config, world_size: int) -> dict[str, Any]:
    """Everything `--dry-run` shows, as plain data; UserError if the layout does not fit."""
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
    """The configuration, once it is known to go with its data, with the vocabulary that a softmax head has to know.

    Data that are not on this machine are asked for a vocabulary alone. Raises UserError: the data are of another kind,
    or have a vocabulary that the model's bits cannot hold, or no code as the model's.
    """
    folder, softmax = config.data.folders[0], config.model.head.kind == "softmax"
    if softmax and not folder:
        if config.model.vocab_size is not None:
            return config
        raise UserError(
            "a softmax head is as large as the vocabulary: give data.path=DIR, or for example model.vocab_size=32000"
        )
    if not softmax and (trust.acts(folder) or not (Path(folder) / FILE_NAME).is_file()):
        return config
    trust.check()
    manifest = _manifest(config)
    check_data(config.model, manifest)
    return config.with_vocab_size(manifest.vocab_size) if softmax else config


def _manifest(config: Config) -> Manifest:
    """Of the data; should they have moved, of what the run has kept of them."""
    try:
        return load_manifest(config.data.folders[0], check_files=False)
    except UserError:
        own = belongings.of_run(Path(config.run))
        if own is None:
            raise
        return load_manifest(own, check_files=False)


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
