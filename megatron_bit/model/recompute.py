"""The head one evaluation at a time: its activations do not grow with the noise samples or the stages of a chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def again(function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments), of which only the arguments are kept, and which the backward pass computes again.

    Nothing in a head draws random numbers, so there is no generator to put back.
    """
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]
