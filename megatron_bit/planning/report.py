"""The plan for a person, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron_bit.planning.search import Candidate, Cluster, Found

GIB = 2**30


def as_dict(found: Found, cluster: Cluster, top: int) -> dict[str, Any]:
    """Everything about the `top` candidates; bytes, seconds, GPU-hours."""
    return {
        "cluster": {
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.gpus_per_node,
            "usable_memory_bytes": round(cluster.usable_memory),
            **cluster.hardware.model_dump(mode="json"),
        },
        "fit": len(found.candidates),
        "too_large": found.too_large,
        "layouts": [_candidate(candidate) for candidate in found.candidates[:top]],
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    tokens = candidate.config.train.global_batch_size * candidate.config.data.seq_length
    return {
        "layout": asdict(candidate.dims),
        "recompute": candidate.config.parallel.recompute,
        "micro_batch_size": candidate.config.train.micro_batch_size,
        "micro_batches": candidate.dims.micro_batches(candidate.config),
        "memory_bytes": {**{k: round(v) for k, v in candidate.memory.items()}, "total": _total(candidate.memory)},
        "seconds": {**asdict(candidate.time), "total": candidate.time.total},
        "tokens_per_second": tokens / candidate.time.total,
        "mfu": candidate.mfu,
        "gpu_hours": candidate.gpu_hours,
        "settings": candidate.settings,
    }


def table(found: Found, cluster: Cluster, top: int) -> str:
    """Fastest first; below it the settings of the first."""
    best = found.candidates[0]
    head = (
        f"{'layout':36} {'mbs':>4} {'memory':>7} {'step':>9} {'backbone':>9} {'head':>8} {'TP':>8} {'PP':>8} {'DP':>8} "
        f"{'optimizer':>9} {'MFU':>6} {'GPU-hours':>11}"
    )
    units = f"{'':36} {'':>4} {'GiB':>7} {'ms':>9} {'ms':>9} {'ms':>8} {'ms':>8} {'ms':>8} {'ms':>8} {'ms':>9} {'%':>6}"
    lines = [
        f"{cluster.world_size:,} GPUs ({cluster.nodes} nodes of {cluster.gpus_per_node}): "
        f"{len(found.candidates):,} layouts fit into {cluster.usable_memory / GIB:.1f} GiB, {found.too_large:,} do not",
        head,
        units,
        *(_row(candidate) for candidate in found.candidates[:top]),
        "",
        "memory of the best: "
        + ", ".join(f"{name} {size / GIB:.2f}" for name, size in best.memory.items() if size)
        + " GiB",
        f"settings of the best: {' '.join(best.settings)}",
    ]
    return "\n".join(lines)


def nothing_fits(found: Found, cluster: Cluster) -> str:
    """Why there is no table."""
    assert found.smallest is not None
    config, dims, memory = found.smallest
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.items() if size)
    return (
        f"none of {found.too_large:,} layouts fits into {cluster.usable_memory / GIB:.1f} GiB; the smallest is {dims} "
        f"ZeRO-{dims.zero_stage} recompute={config.parallel.recompute} micro-batch {config.train.micro_batch_size}: "
        f"{sum(memory.values()) / GIB:.1f} GiB ({parts}); use more GPUs or a smaller model"
    )


def _row(candidate: Candidate) -> str:
    d, t = candidate.dims, candidate.time
    name = f"{d} ZeRO-{d.zero_stage}" + (" recompute" if candidate.config.parallel.recompute == "full" else "")
    times = (t.total, t.backbone, t.head, t.tensor, t.pipeline, t.data, t.optimizer)
    widths = (9, 9, 8, 8, 8, 8, 9)
    cells = " ".join(f"{1e3 * seconds:{width}.1f}" for seconds, width in zip(times, widths, strict=True))
    return (
        f"{name:36} {candidate.config.train.micro_batch_size:4} {_total(candidate.memory) / GIB:7.1f} {cells} "
        f"{100 * candidate.mfu:6.1f} {candidate.gpu_hours:11,.1f}"
    )


def _total(memory: dict[str, float]) -> int:
    return round(sum(memory.values()))
