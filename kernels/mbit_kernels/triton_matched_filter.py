"""Loss of bits decided one by one in Triton: matched filter, error, weight and sum over bits in one pass.

The logits exist in registers only. The backward pass computes them again, so that autograd keeps the arguments
and nothing else (plain form: matched_filter.py). Sums run over a row, inside one program.
"""

# what jit makes of a function is not what pyright sees
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mbit_kernels.matched_filter import CLIP
from mbit_kernels.triton_tiles import rows_of, tile

TILE, WARPS = 1024, 4  # 8 elements a thread: with 16 the cross-entropy spilled registers


@triton.jit
def _logits(
    residual, z, x, log_sigma, row, column, inside, rows, residual_stride, z_stride, samples, bits, clip,
    MATCHED: tl.constexpr,
):  # fmt: skip
    """x * logits, x, and sigma^2 of the rows; a bit outside is x = 0."""
    logits = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    sign = tl.load(x + row // samples * bits + column, mask=inside, other=0).to(tl.float32)
    sigma = tl.exp(tl.load(log_sigma + row, mask=row < rows, other=0.0))
    if MATCHED:
        odds = 2.0 * tl.load(z + row * z_stride + column, mask=inside, other=0.0) / (sigma * sigma)
        logits += tl.minimum(tl.maximum(odds, -clip), clip)
    return sign * logits, sign, sigma * sigma


@triton.jit
def _forward(
    residual, z, x, log_sigma, loss, error, residual_stride, z_stride, rows, samples, bits, clip,
    MATCHED: tl.constexpr, MSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < bits)
    margin, _, variance = _logits(
        residual, z, x, log_sigma, row, column, inside, rows, residual_stride, z_stride, samples, bits, clip, MATCHED
    )
    wrong = tl.sigmoid(-margin)
    squared = tl.sum(tl.where(inside, 4.0 * wrong * wrong, 0.0), axis=1)[:, None]
    if MSE:
        value = (1.0 + 1.0 / variance) * squared
    else:
        tail = tl.exp(-tl.abs(margin))
        more = 1.0 + tail  # log(1 + tail), also where 1 + tail rounds (Kahan)
        log1p = tl.where(more == 1.0, tail, tl.log(more) * (tail / tl.where(more == 1.0, 1.0, more - 1.0)))
        value = tl.sum(tl.where(inside, tl.maximum(-margin, 0.0) + log1p, 0.0), axis=1)[:, None]
    tl.store(loss + row, value / bits, mask=row < rows)
    tl.store(error + row, squared, mask=row < rows)


@triton.jit
def _backward(
    grad, residual, z, x, log_sigma, d_residual, residual_stride, z_stride, rows, samples, bits, clip,
    MATCHED: tl.constexpr, MSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < bits)
    margin, sign, variance = _logits(
        residual, z, x, log_sigma, row, column, inside, rows, residual_stride, z_stride, samples, bits, clip, MATCHED
    )
    wrong, right = tl.sigmoid(-margin), tl.sigmoid(margin)  # 1 - wrong would cancel
    upstream = tl.load(grad + row, mask=row < rows, other=0.0) / bits
    if MSE:
        value = -8.0 * (1.0 + 1.0 / variance) * upstream * sign * wrong * wrong * right
    else:
        value = -upstream * sign * wrong
    tl.store(d_residual + row * bits + column, value.to(d_residual.dtype.element_ty), mask=inside)


def bit_loss(
    residual: Tensor, z: Tensor, x: Tensor, log_sigma: Tensor, kind: Literal["mse", "bce"], matched: bool
) -> tuple[Tensor, Tensor]:
    """As `matched_filter.bit_loss`."""
    return _BitLoss.apply(residual, z, x, log_sigma, kind == "mse", matched)  # type: ignore[no-any-return]


def _launch(kernel: Any, tensors: tuple[Tensor, ...], residual: Tensor, z: Tensor, samples: int, how: Any) -> None:
    count, bits = residual.shape
    rows, columns = tile(bits, TILE)
    kernel[(triton.cdiv(count, rows),)](
        *tensors, residual.stride(0), z.stride(0), count, samples, bits, CLIP, *how, rows, columns, num_warps=WARPS
    )  # fmt: skip


class _BitLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, z: Tensor, x: Tensor, log_sigma: Tensor, mse: bool, matched: bool
    ) -> tuple[Tensor, Tensor]:
        a, b, x, levels = rows_of(residual), rows_of(z), x.contiguous(), log_sigma.contiguous()
        loss, error = torch.empty_like(levels), torch.empty_like(levels)
        ctx.how, ctx.samples = (matched, mse), log_sigma.shape[-1]
        _launch(_forward, (a, b, x, levels, loss, error), a, b, ctx.samples, ctx.how)
        ctx.save_for_backward(residual, z, x, levels)
        ctx.mark_non_differentiable(error)
        ctx.set_materialize_grads(False)
        return loss, error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        residual, z, x, levels = ctx.saved_tensors
        out = torch.empty_like(residual, memory_format=torch.contiguous_format)
        a, b, grad = rows_of(residual), rows_of(z), grads[0].contiguous()
        _launch(_backward, (grad, a, b, x, levels, out), a, b, ctx.samples, ctx.how)
        return out, None, None, None, None, None
