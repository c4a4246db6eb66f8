"""Are there file descriptors enough for the groups of a job: asked before they are made. Imports no torch.

gloo takes four for each group that a rank is in (an epoll, a socket to listen on, a pipe) and one for each other rank
of the group, and megatron-core makes 18 groups whatever the layout. Measured in `tests/dist/test_exhausted.py`.
"""

from __future__ import annotations

import resource
import socket
import time
from typing import Any, NamedTuple

from megatron_bit.errors import LocalUserError, Stopped, UserError
from megatron_bit.io.exhausted import open_now
from megatron_bit.parallel.dims import ParallelDims

GROUPS, OF_A_GROUP = 18, 4
OTHERS = 32  # for the run's files, tensorboard, shards, a checkpoint, what is open for a moment, libraries
STORE, OF_A_RANK = 16, 2  # rank 0's store: a connection of torch's and one of our own (ending.LastWord) for each rank
_KEY, _VERDICT, _READ = (f"megatron_bit/descriptors{what}" for what in ("", "/verdict", "/read"))
PARTING_SECONDS = 10.0  # that rank 0, and its store with it, stays for the others to read why the job ends


class Limit(NamedTuple):
    """What one rank may open and will."""

    rank: int
    host: str
    allowed: int
    needed: int


def needed(dims: ParallelDims, rank: int, gloo: bool, already: int) -> int:
    """About how many descriptors a rank comes to have open. Under NCCL only what is sure is counted.

    Args:
        already: that are open before the groups are made.
    """
    total = already + GROUPS * OF_A_GROUP + OTHERS
    if gloo:
        # an upper bound of what megatron-core makes: 4 groups of the world, 6 along each axis
        total += 4 * (dims.world_size - 1) + 6 * (dims.tp - 1 + dims.dp - 1 + dims.pp - 1)
    return total + (STORE + OF_A_RANK * dims.world_size if rank == 0 and dims.world_size > 1 else 0)


def check_here(dims: ParallelDims, gloo: bool, already: int | None = None) -> None:
    """For a process that is alone, or starts the ranks of this machine, which inherit its limit. Raises UserError."""
    found = _limit(dims, 0, gloo, already)
    if found.allowed < found.needed:
        raise UserError(_line([found], dims.world_size))


def check_store(dims: ParallelDims, rank: int) -> None:
    """Before there is a store: LocalUserError if this rank could not even hold it, or connect to it."""
    found, already = _limit(dims, rank, True, None), open_now()
    least = already + STORE + (OF_A_RANK * dims.world_size if rank == 0 else 0)
    if found.allowed < least:
        raise LocalUserError(_line([found], dims.world_size))


def check_together(
    dims: ParallelDims, rank: int, gloo: bool, already: int, store: Any, word: Any, timeout: float
) -> None:
    """Rank 0 looks at the limits of all ranks; they go on or raise together. All ranks call it.

    Args:
        already: descriptors that were open before there was a store.
        store: of torch's rendezvous.
        word: ending.LastWord, which says if a rank has left instead of coming here.
        timeout: seconds to wait for the others.

    Raises:
        UserError: a rank is not allowed enough.
        Stopped: a rank has said why it left.
        TimeoutError: one has not come.
    """
    store.set(f"{_KEY}/{rank}", "\n".join(map(str, _limit(dims, rank, gloo, already))))
    if rank == 0:
        said = [_wait(store, word, f"{_KEY}/{other}", timeout).split("\n") for other in range(dims.world_size)]
        limits = [Limit(int(n), host, int(allowed), int(need)) for n, host, allowed, need in said]
        few = [limit for limit in limits if limit.allowed < limit.needed]
        store.set(_VERDICT, _line(few, dims.world_size) if few else "-")
    verdict = _wait(store, word, _VERDICT, timeout)
    if verdict != "-":
        read, deadline = store.add(_READ, 1), time.monotonic() + PARTING_SECONDS
        while rank == 0 and read < dims.world_size and time.monotonic() < deadline:
            time.sleep(0.02)
            read = store.add(_READ, 0)
        raise UserError(verdict)


def _wait(store: Any, word: Any, key: str, timeout: float) -> str:
    deadline, pause = time.monotonic() + timeout, 0.002
    while not store.check([key]):
        code = word.heard()
        if code is not None:
            raise Stopped("another rank has left", code)
        if time.monotonic() > deadline:
            who = "rank 0 has not answered" if key == _VERDICT else f"rank {key.rsplit('/', 1)[1]} did not come"
            raise TimeoutError(f"{who} in {timeout:.0f} s (parallel.timeout_minutes)")
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    return store.get(key).decode()


def _limit(dims: ParallelDims, rank: int, gloo: bool, already: int | None) -> Limit:
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed == resource.RLIM_INFINITY:
        allowed = 2**62
    return Limit(
        rank, socket.gethostname(), allowed, needed(dims, rank, gloo, open_now() if already is None else already)
    )


def _line(few: list[Limit], ranks: int) -> str:
    worst = max(few, key=lambda limit: limit.needed - limit.allowed)
    enough = 256
    while enough < worst.needed:
        enough *= 2
    who = "this process" if ranks == 1 else f"rank {worst.rank} of {ranks} ranks"
    others = f" ({len(few)} ranks have too few)" if len(few) > 1 else ""
    return (
        f"{worst.allowed} open files (ulimit -n) are too few on {worst.host}: {who} needs about {worst.needed}{others};"
        f" allow more with `ulimit -n {enough}` in the shell that starts it, and start again"
    )
