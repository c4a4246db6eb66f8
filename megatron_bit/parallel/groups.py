"""Process groups: torch.distributed and megatron-core's groups, started and ended in one place."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_bit.compat import mcore
from megatron_bit.config import Config
from megatron_bit.environment import world_size
from megatron_bit.errors import EXIT_RANK_LOST, LocalUserError
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
    with _in_time(120 * config.parallel.timeout_minutes):
        _join(datetime.timedelta(minutes=config.parallel.timeout_minutes))
        return build_groups(config, dims)


@contextlib.contextmanager
def _in_time(seconds: float) -> Iterator[None]:
    """End this process if what is in the block takes longer. torch's client of the store, among others, waits without
    a limit for a rank 0 that listens and does not answer (2.13)."""

    def leave() -> None:
        rank, host, port = (os.environ.get(name, "?") for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
        print(
            f"megatron-bit: error: rank {rank}: the ranks have not come together in {seconds:.0f} s "
            f"(2 x parallel.timeout_minutes) at MASTER_ADDR:MASTER_PORT = {host}:{port}; one is stopped, or its "
            "node gone; the same command tries again",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_RANK_LOST)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _join(timeout: datetime.timedelta) -> None:
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl"
    if not dist.is_initialized():
        try:
            if "RANK" in os.environ:
                dist.init_process_group(backend, timeout=timeout)
            else:
                store: dist.Store = dist.HashStore()  # type: ignore[reportPrivateImportUsage]
                dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        except (dist.DistError, ValueError) as error:  # each rank meets it by itself
            host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
            raise LocalUserError(
                f"MASTER_ADDR:MASTER_PORT = {host}:{port} cannot be used ({str(error).splitlines()[0][:120]}); "
                "if another job holds the port, choose a free one (torchrun --master-port, or let --nproc choose); "
                "if a rank did not come, see what it says"
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
    if dist.is_initialized():
        from megatron.core import parallel_state

        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
