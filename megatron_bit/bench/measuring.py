"""How an operation on a device is timed, and how its result is compared."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int = 7, calls: int = 10) -> float:
    """Of a call, median of stretches of calls that the device works off without a wait of the host."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(repeats + 1):
        wait()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        times.append(1e3 * (time.perf_counter() - begin) / calls)
    return float(f"{sorted(times[1:])[repeats // 2]:.4g}")  # the first one warms up


def relative_error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, of the whole tensors."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
