"""Decisions are taken once and shared: no rank raises alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_bit.errors import Exhausted, Stopped, UserError
from megatron_bit.io.exhausted import exhausted

T = TypeVar("T")


def on_rank0(function: Callable[[], T]) -> T:
    """Run on rank 0 and hand the result to every rank; a UserError there is raised on every rank.

    Any other exception is raised on rank 0 as it is, and on the others as a RuntimeError that names it; if something
    ran out, Exhausted on rank 0, which says it, and Stopped on the others.
    """
    outcome: list[Any] = [None]
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            outcome = [("ok", function())]
        except Exception as error:
            if (out := exhausted(error, 0, dist.get_world_size())) is not None:
                outcome = [("out", str(out))]
            elif isinstance(error, UserError):
                outcome = [("user", str(error))]
            else:
                failure = error
                outcome = [("failed", f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    kind, value = outcome[0]
    if kind == "user":
        raise UserError(value)
    if kind == "out":
        raise _by_one(value)
    if kind == "failed":
        raise RuntimeError(f"rank 0 failed: {value}")
    return value


def on_every_rank(function: Callable[[], T]) -> T:
    """Run on every rank; if it fails with UserError or OSError anywhere, every rank raises the same UserError.

    If something ran out anywhere, rank 0 raises Exhausted, which names that rank, and the others Stopped.
    """
    result: Any = None
    problem: tuple[bool, str] | None = None
    try:
        result = function()
    except Exception as error:
        out = exhausted(error, dist.get_rank(), dist.get_world_size())
        if out is None and not isinstance(error, UserError | OSError):
            raise
        problem = (out is not None, str(out or error))
    problems: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    failed = [(rank, *found) for rank, found in enumerate(problems) if found is not None]
    for _, ran_out, text in failed:
        if ran_out:
            raise _by_one(text)
    if failed:
        rank, _, text = failed[0]
        others = f" (rank {rank}; {len(failed)} of {len(problems)} ranks)" if len(problems) > 1 else ""
        raise UserError(f"{text}{others}")
    return result


def _by_one(text: str) -> UserError:
    """What every rank raises when all know that something ran out: rank 0 says it."""
    return Exhausted(text) if dist.get_rank() == 0 else Stopped(text, Exhausted.exit_code)
