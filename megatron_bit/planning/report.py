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


COLUMNS = {  # heading: (unit, width)
    "mbs": ("", 4), "memory": ("GiB", 7), "step": ("ms", 9), "backbone": ("ms", 9), "head": ("ms", 8), "TP": ("ms", 8),
    "PP": ("ms", 8), "DP": ("ms", 8), "optimizer": ("ms", 9), "MFU": ("%", 6), "GPU-hours": ("", 11),
}  # fmt: skip


def table(found: Found, cluster: Cluster, top: int) -> str:
    """Fastest first; below it the settings of the first."""
    best, shown = found.candidates[0], found.candidates[:top]
    names = max(len(_name(candidate)) for candidate in shown)
    heads = " ".join(f"{name:>{width}}" for name, (_, width) in COLUMNS.items())
    units = " ".join(f"{unit:>{width}}" for unit, width in COLUMNS.values()).rstrip()
    return "\n".join(
        [
            f"{cluster.world_size:,} GPUs ({cluster.nodes} nodes of {cluster.gpus_per_node}): "
            f"{len(found.candidates):,} layouts fit into {cluster.usable_memory / GIB:.1f} GiB, "
            f"{found.too_large:,} do not",
            f"{'layout':{names}} {heads}",
            f"{'':{names}} {units}",
            *(f"{_name(candidate):{names}} {_cells(candidate)}" for candidate in shown),
            "",
            "memory of the best: "
            + ", ".join(f"{name} {size / GIB:.2f}" for name, size in best.memory.items() if size)
            + " GiB",
            f"settings of the best: {' '.join(best.settings)}",
        ]
    )


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


def _name(candidate: Candidate) -> str:
    again = candidate.config.parallel.recompute
    return f"{candidate.dims} ZeRO-{candidate.dims.zero_stage}" + (f" again={again}" if again != "none" else "")


def _cells(candidate: Candidate) -> str:
    t = candidate.time
    times = (t.total, t.backbone, t.head, t.tensor, t.pipeline, t.data, t.optimizer)
    cells = (
        str(candidate.config.train.micro_batch_size),
        f"{_total(candidate.memory) / GIB:.1f}",
        *(f"{1e3 * seconds:.1f}" for seconds in times),
        f"{100 * candidate.mfu:.1f}",
        f"{candidate.gpu_hours:,.1f}",
    )
    return " ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS.values(), strict=True))


def _total(memory: dict[str, float]) -> int:
    return round(sum(memory.values()))
