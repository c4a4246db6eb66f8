"""Decisions are taken once and shared: no rank raises alone, none waits for one that has left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_bit.errors import LocalUserError, Stopped, UserError

T = TypeVar("T")


_SAID = "megatron_bit/said"


def alone(error: UserError) -> UserError:
    """What to raise for an error that this rank found by itself, and perhaps others as well: one of them says it."""
    if dist.get_world_size() == 1:
        return error
    try:
        first = _store().add(_SAID, 1) == 1
    except RuntimeError:  # the rank that holds the store has left, so it has said something
        first = False
    return LocalUserError(str(error)) if first else Stopped(str(error))


def lost(error: RuntimeError) -> Exception:
    """What to raise for an error of a collective: Stopped if another rank has said what is wrong, ConnectionError if
    it has gone without a word, or the error itself if it is of another kind."""
    text = str(error)
    if not isinstance(error, dist.DistError) and not any(words in text for words in _GONE):
        return error
    try:
        if _store().check([_SAID]):
            return Stopped(text)
    except RuntimeError:
        pass
    return ConnectionError(f"another rank has ended ({text.splitlines()[0][-100:]})")


def unheard(error: RuntimeError) -> list[int] | None:
    """The ranks that a collective waited for in vain; None for an error that is no time-out.

    Whoever has waited says so in the store, and looks a little later who has not: those ranks are stopped, or in
    something else. A store that does not answer is rank 0's; one that is gone went with rank 0, which had found out
    before, and the list is empty. Takes at most PROBE_SECONDS more.
    """
    if "timed out" not in str(error).lower():
        return None
    waiting: list[int] = []
    gone = threading.Event()

    def probe() -> None:
        store, me = _store(), dist.get_rank()
        try:
            store.set(f"{_WAITS}/{me}", "1")
            time.sleep(PROBE_SECONDS / 2)
            waiting.extend(r for r in range(dist.get_world_size()) if store.check([f"{_WAITS}/{r}"]))
        except RuntimeError:
            gone.set()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if gone.is_set():
        return []
    return [rank for rank in range(dist.get_world_size()) if rank not in waiting] if waiting else [0]


_WAITS, PROBE_SECONDS = "megatron_bit/waits", 6.0
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


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
