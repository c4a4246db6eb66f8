"""Process groups: torch.distributed and megatron-core's groups, started and ended in one place."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_bit.config import Config
from megatron_bit.errors import LocalUserError, RankLost, Stopped
from megatron_bit.io.environment import environment_int, world_size
from megatron_bit.io.exhausted import open_now
from megatron_bit.parallel import descriptors, ending, mcore
from megatron_bit.parallel.dims import ParallelDims


@dataclass(frozen=True)
class Groups:
    """This rank's place in the layout, and its process groups."""

    dims: ParallelDims
    rank: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    collection: Any  # megatron-core's ProcessGroupCollection
    device: torch.device

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.collection.tp

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.dims.pp - 1


def init(config: Config) -> Groups:
    """Join the job: device, default process group (NCCL or gloo) and megatron-core's groups.

    Without torchrun's environment this is a world of one. Raises UserError for degrees that do not fit and for
    a port that is taken; every rank computes the same checks, so that none is left waiting. A job that has not come
    together in twice parallel.timeout_minutes ends with EXIT_RANK_LOST.
    """
    dims = ParallelDims.build(config, world_size())
    mcore.prepare()
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl"
    minutes = config.parallel.timeout_minutes
    with ending.in_time(120 * minutes, Path(config.run)):
        if not dist.is_initialized():
            _join(dims, backend, datetime.timedelta(minutes=minutes))
        return build_groups(config, dims)


def _join(dims: ParallelDims, backend: str, timeout: datetime.timedelta) -> None:
    """torch's default group, after all ranks have said that they can have the descriptors for theirs."""
    rank, gloo, already = environment_int("RANK", 0), backend == "gloo", open_now()
    if "RANK" not in os.environ or dims.world_size == 1:
        descriptors.check_here(dims, gloo)
    if "RANK" not in os.environ:
        store: dist.Store = dist.HashStore()  # type: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    try:
        descriptors.check_store(dims, rank)
        # what init_process_group does by itself, with the store in hand before the groups are made
        found, _, _ = next(rendezvous("env://", timeout=timeout))
        found.set_timeout(timeout)
        store = dist.PrefixStore("default_pg", found)  # type: ignore[reportPrivateImportUsage]
        if dims.world_size > 1:
            word = ending.begin(store, rank, dims.world_size)
            descriptors.check_together(dims, rank, gloo, already, store, word, timeout.total_seconds())
        dist.init_process_group(backend, store=store, rank=rank, world_size=dims.world_size, timeout=timeout)
    except TimeoutError as error:
        raise ending.alone(RankLost(f"{error}; is the process stopped, or its node gone?")) from None
    except (dist.DistError, ValueError) as error:  # each rank meets it by itself
        code = ending.said()
        if code is not None:
            raise Stopped(str(error), code) from None
        if "timed out" in str(error).lower():
            raise ending.apart(timeout.total_seconds(), "parallel.timeout_minutes") from None
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        raise LocalUserError(
            f"MASTER_ADDR:MASTER_PORT = {host}:{port} cannot be used ({str(error).splitlines()[0][:120]}); "
            "if another job holds the port, choose a free one (torchrun --master-port, or let --nproc choose)"
        ) from None


def build_groups(config: Config, dims: ParallelDims) -> Groups:
    """megatron-core's groups over the running default group."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=dims.tp,
        pipeline_model_parallel_size=dims.pp,
        virtual_pipeline_model_parallel_size=dims.vpp if dims.vpp > 1 else None,
        create_gloo_process_groups=False,  # nobody uses them, and one of them has a time-out of its own, 30 minutes
        distributed_timeout_minutes=config.parallel.timeout_minutes,  # type: ignore[arg-type]  # of a timedelta
    )
    mcore.seed_tracker(config.train.seed)
    return Groups(
        dims=dims,
        rank=dist.get_rank(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        collection=ProcessGroupCollection.use_mpu_process_groups(),
        device=mcore.device(),
    )


def shutdown() -> None:
    """Leave the groups; safe to call twice."""
    ending.over()
    if dist.is_initialized():
        from megatron.core import parallel_state

        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
