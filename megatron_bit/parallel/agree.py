"""Decisions are taken once and shared: no rank raises alone, none waits for one that has left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_bit.errors import UserError

T = TypeVar("T")


def on_rank0(function: Callable[[], T]) -> T:
    """Run on rank 0 and hand the result to every rank; a UserError there is raised on every rank.

    Any other exception is raised on rank 0 as it is, and on the others as a RuntimeError that names it.
    """
    outcome: list[Any] = [None]
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            outcome = [("ok", function())]
        except UserError as error:
            outcome = [("user", str(error))]
        except Exception as error:
            failure = error
            outcome = [("failed", f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    kind, value = outcome[0]
    if kind == "user":
        raise UserError(value)
    if kind == "failed":
        raise RuntimeError(f"rank 0 failed: {value}")
    return value


def on_every_rank(function: Callable[[], T]) -> T:
    """Run on every rank; if it fails with UserError or OSError anywhere, every rank raises the same UserError."""
    result: Any = None
    problem: str | None = None
    try:
        result = function()
    except (UserError, OSError) as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    failed = [(rank, text) for rank, text in enumerate(problems) if text is not None]
    if failed:
        rank, text = failed[0]
        others = f" (rank {rank}; {len(failed)} of {len(problems)} ranks)" if len(problems) > 1 else ""
        raise UserError(f"{text}{others}")
    return result
