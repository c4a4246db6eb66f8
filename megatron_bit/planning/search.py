"""All layouts that the configuration's own rules accept on a cluster, those that fit, fastest first."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bit.config import Config
from megatron_bit.errors import UserError
from megatron_bit.parallel.dims import ParallelDims, divisors
from megatron_bit.parallel.split import least_layers
from megatron_bit.planning.hardware import Hardware
from megatron_bit.planning.memory import memory_per_rank
from megatron_bit.planning.times import Overlap, StepTime, step_time, utilization

USABLE = 0.9  # of a device's memory: the rest is for CUDA, NCCL and the allocator's fragments; an assumption
LARGEST_MICRO_BATCH = 64
CHUNKS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16)  # of a pipeline rank


@dataclass(frozen=True)
class Cluster:
    hardware: Hardware
    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable_memory(self) -> float:
        return USABLE * self.hardware.memory


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, and what is predicted for it."""

    config: Config
    dims: ParallelDims
    memory: dict[str, float]
    time: StepTime
    mfu: float

    @property
    def settings(self) -> list[str]:
        """key=value pairs that select it in `train`."""
        p, d = self.config.parallel, self.dims
        return [
            f"parallel.tp={d.tp}",
            f"parallel.pp={d.pp}",
            f"parallel.vpp={d.vpp}",
            f"parallel.sequence_parallel={str(p.sequence_parallel).lower()}",
            f"parallel.zero_stage={d.zero_stage}",
            f"parallel.recompute={p.recompute}",
            f"train.micro_batch_size={self.config.train.micro_batch_size}",
        ]

    @property
    def gpu_hours(self) -> float:
        """Of all of `train.steps`."""
        return self.time.total * self.config.train.steps * self.dims.world_size / 3600


@dataclass(frozen=True)
class Found:
    """Candidates, fastest first, and what became of the others."""

    candidates: list[Candidate]
    too_large: int  # layouts that do not fit into memory
    smallest: tuple[Config, ParallelDims, dict[str, float]] | None  # of those, the one that needs least


def search(config: Config, cluster: Cluster, overlap: Overlap = Overlap()) -> Found:
    """Try every layout. UserError, with the reason, if the rules accept none at all."""
    candidates: list[Candidate] = []
    smallest: tuple[Config, ParallelDims, dict[str, float]] | None = None
    too_large = 0
    refused: UserError | None = None
    cluster.hardware.precision(config.train.precision)
    for layout in layouts(config, cluster):
        try:
            dims = ParallelDims.build(layout, cluster.world_size)
        except UserError as error:
            refused = refused or error
            continue
        memory = memory_per_rank(layout, dims)
        size = sum(memory.values())
        if size > cluster.usable_memory:
            too_large += 1
            if smallest is None or size < sum(smallest[2].values()):
                smallest = layout, dims, memory
            continue
        time = step_time(layout, dims, cluster.hardware, cluster.gpus_per_node, overlap)
        mfu = utilization(layout, dims, cluster.hardware, time.total)
        candidates.append(Candidate(layout, dims, memory, time, mfu))
    if not candidates and smallest is None:
        raise refused or UserError(
            f"train.global_batch_size {config.train.global_batch_size} cannot be split over {cluster.world_size} GPUs "
            "in any layout; use a larger one, with more divisors, or fewer GPUs"
        )
    candidates.sort(key=lambda candidate: (candidate.time.total, sum(candidate.memory.values())))
    return Found(candidates, too_large, smallest)


def layouts(config: Config, cluster: Cluster) -> list[Config]:
    """Configurations to try: degrees that multiply to the cluster, TP inside a node. `ParallelDims` judges them."""
    world, batch = cluster.world_size, config.train.global_batch_size
    chunks = config.model.num_layers + 1 - least_layers(config)
    found, softmax = [], config.model.head.kind == "softmax"
    for tp in divisors(cluster.gpus_per_node):
        for pp in (pp for pp in divisors(world // tp) if pp <= chunks):
            dp = world // (tp * pp)
            if batch % dp:
                continue
            sizes = {2**i for i in range(LARGEST_MICRO_BATCH.bit_length())} | {config.train.micro_batch_size}
            micro = [size for size in sorted(sizes) if batch // dp % size == 0]
            for vpp in (vpp for vpp in CHUNKS if vpp == 1 or (pp > 1 and pp * vpp <= chunks)):
                for zero in ((1,) if pp > 1 else (1, 2, 3)) if dp > 1 else (0,):
                    for sequence in (True, False) if tp > 1 else (config.parallel.sequence_parallel,):
                        for recompute in ("none", "full") if softmax else ("none", "head", "full"):
                            values = {"tp": tp, "pp": pp, "vpp": vpp, "zero_stage": zero, "recompute": recompute}
                            values["sequence_parallel"] = sequence
                            parallel = config.parallel.model_copy(update=values)
                            for size in micro:
                                train = config.train.model_copy(update={"micro_batch_size": size})
                                found.append(config.model_copy(update={"parallel": parallel, "train": train}))
    return found
