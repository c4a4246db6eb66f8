"""What the Triton kernels share: tensors as rows without a copy, and the size of a program's tile."""

from __future__ import annotations

import triton
from torch import Tensor


def rows_of(x: Tensor) -> Tensor:
    """[..., W] as [rows, W], last dimension dense; a view where strides allow it (a chunk of a wider tensor does)."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x.reshape(-1, x.shape[-1])


def tile(columns: int, elements: int) -> tuple[int, int]:
    """(rows, columns) of a tile of about `elements`: all columns, as powers of two, which Triton wants."""
    width = triton.next_power_of_2(columns)
    return max(1, elements // width), width


def warps(rows: int, width: int) -> int:
    """Warps of a program, so that a thread has 16 elements of its tile at the most (registers), 1 to 16."""
    return min(16, max(1, rows * width // 512))
