"""AdaLN-modulated RMSNorm in Triton: one pass over memory forward, one backward (plain form: rms_norm.py).

A program has whole rows in registers, so the backward pass computes 1 / rms again from x instead of keeping it.
Nothing is summed over rows: there is no order of sums that could differ between runs.
"""

# what jit makes of a function is not what pyright sees
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mbit_kernels.triton_tiles import rows_of, tile, warps

TILE = 2048  # elements; a thread has 16 of each of the up to five tensors of a row


@triton.jit
def _normalize(x, at, inside, width, eps):
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)[:, None]
    return value * inverse, inverse


@triton.jit
def _forward(
    x, shift, scale, out, x_stride, shift_stride, scale_stride, rows, width, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < width)
    normed, _ = _normalize(x, row * x_stride + column, inside, width, eps)
    gain = 1.0 + tl.load(scale + row * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    value = normed * gain + tl.load(shift + row * shift_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, x, scale, d_x, d_scale, grad_stride, x_stride, scale_stride, rows, width, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < width)
    normed, inverse = _normalize(x, row * x_stride + column, inside, width, eps)
    upstream = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    gain = 1.0 + tl.load(scale + row * scale_stride + column, mask=inside, other=0.0).to(tl.float32)
    d_normed = upstream * gain
    mean = (tl.sum(d_normed * normed, axis=1) / width)[:, None]
    value = (d_normed - normed * mean) * inverse
    tl.store(d_x + row * width + column, value.to(d_x.dtype.element_ty), mask=inside)
    tl.store(d_scale + row * width + column, (upstream * normed).to(d_scale.dtype.element_ty), mask=inside)


def modulated_rms_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """As `rms_norm.modulated_rms_norm`; sums in float32 whatever the dtype."""
    return _ModulatedRMSNorm.apply(x, shift, scale, eps)  # type: ignore[no-any-return]


class _ModulatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        a, b, c = rows_of(x), rows_of(shift), rows_of(scale)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        count, width = a.shape
        rows, columns = tile(width, TILE)
        _forward[(triton.cdiv(count, rows),)](
            a, b, c, out, a.stride(0), b.stride(0), c.stride(0), count, width, eps, rows, columns,
            num_warps=warps(rows, columns),
        )  # fmt: skip
        ctx.save_for_backward(x, scale)
        ctx.eps, ctx.shift_dtype = eps, shift.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, scale = ctx.saved_tensors
        g, a, c = rows_of(grads[0]), rows_of(x), rows_of(scale)
        d_x, d_scale = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, scale))
        count, width = a.shape
        rows, columns = tile(width, TILE)
        _backward[(triton.cdiv(count, rows),)](
            g, a, c, d_x, d_scale, g.stride(0), a.stride(0), c.stride(0), count, width, ctx.eps, rows, columns,
            num_warps=warps(rows, columns),
        )  # fmt: skip
        return d_x, grads[0].to(ctx.shift_dtype), d_scale, None
