"""What groups a job of this project has, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def timeouts(arguments: list[str]) -> list[tuple[str, float | None]]:
    """Runs in a rank: `megatron-bit train`; (description, time-out in minutes) of every group it makes."""
    import tiny_runs
    import torch.distributed as dist
    from megatron.core import parallel_state

    plain, found = dist.new_group, []

    def new_group(*args: Any, **kwargs: Any) -> Any:
        timeout = kwargs.get("timeout")
        found.append((str(kwargs.get("group_desc")), None if timeout is None else timeout.total_seconds() / 60))
        return plain(*args, **kwargs)

    dist.new_group = parallel_state.torch.distributed.new_group = new_group
    assert tiny_runs.train(arguments) == 0
    return found


def stopped_before_joining(arguments: list[str], victim: int, where: str, said: Path) -> None:
    """Runs in a rank, and ends it: `megatron-bit train`, with rank `victim` stopped (SIGSTOP) before it takes part in
    the `store`, or in the `groups`, which the others then wait for."""
    import os
    import signal

    import tiny_runs

    from megatron_bit.parallel import descriptors

    if os.environ["RANK"] == str(victim):
        if where == "store":
            os.kill(os.getpid(), signal.SIGSTOP)
        descriptors.check_together = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
    tiny_runs.command(arguments, said)
