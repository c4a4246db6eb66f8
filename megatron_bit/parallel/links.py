"""Do the ranks reach each other, and how fast: one all-reduce before a job of the launcher trains."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from megatron_bit.errors import UserError
from megatron_bit.parallel.groups import Groups

CUDA_BYTES, CPU_BYTES = 256 * 2**20, 4 * 2**20
REPEATS = 3


def check_links(groups: Groups) -> str:
    """Sum a known tensor over all ranks, and time it; returns one line. All ranks call it.

    The bandwidth is NCCL's "bus bandwidth": what the slowest link carries, 2 (n - 1) / n bytes a byte of the tensor.

    Raises:
        UserError: on every rank, if the sum is wrong.
    """
    cuda = groups.device.type == "cuda"
    count, ranks = (CUDA_BYTES if cuda else CPU_BYTES) // 4, groups.dims.world_size
    tensor = torch.empty(count, dtype=torch.float32, device=groups.device)
    best = float("inf")
    for _ in range(REPEATS + 1):  # the first opens the connections
        tensor.fill_(groups.rank + 1)
        _wait(cuda)
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        _wait(cuda)
        best = min(best, time.perf_counter() - begin)
    wanted = ranks * (ranks + 1) / 2
    wrong = (tensor != wanted).sum().double()
    dist.all_reduce(wrong)
    if wrong:
        raise UserError(
            f"an all-reduce over {ranks} ranks gave {int(wrong)} wrong sums: a link or a GPU is broken; "
            "run nccl-tests over halves of the nodes to find it, and put it into the cordon file"
        )
    rate = 2 * (ranks - 1) / ranks * count * 4 / best / 1e9
    return f"all-reduce of {count * 4 / 2**20:.0f} MiB over {ranks} ranks: {1e3 * best:.1f} ms, {rate:.2f} GB/s a link"


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()
