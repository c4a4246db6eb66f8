"""Processes of their own for what needs Triton, so that no other test sees it, nor how it is set.

Triton reads TRITON_INTERPRET when it is imported, and torch.compile looks at it too.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def interpreted(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) where Triton's kernels run in its interpreter, on the CPU."""
    return _pool("1").submit(function, *arguments).result()


def compiling(function: Callable[..., Any], *arguments: Any) -> Any:
    """The same where they are compiled; nothing can run them here."""
    return _pool("0").submit(function, *arguments).result()


@functools.cache
def _pool(interpret: str) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=_begin, initargs=(interpret,))


def _begin(interpret: str) -> None:
    os.environ["TRITON_INTERPRET"] = interpret
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is new with NaN: nothing unwritten passes
