"""Cross-entropy over the values of groups of bits in Triton: no float32 copy of the logits, forward or backward.

The plain form (cross_entropy.py) makes one for the softmax, one for the mask where groups differ in size, and keeps
one. Here autograd keeps the logits as they are, and a log-sum-exp for each row of U. A row is in one program.
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

from mbit_kernels.triton_tiles import tile, warps

TILE = 4096


@triton.jit
def _place(logits, invalid, rows, groups, values, token_stride, group_stride, MASKED: tl.constexpr,
           ROWS: tl.constexpr, VALUES: tl.constexpr):  # fmt: skip
    """Logits of a program's rows, -inf where there is no value, and where they stand."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    value = tl.arange(0, VALUES)[None, :]
    group = row % groups
    at = row // groups * token_stride + group * group_stride + value
    inside = (row < rows) & (value < values)
    x = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
    if MASKED:
        x = tl.where(tl.load(invalid + group * values + value, mask=inside, other=1) != 0, float("-inf"), x)
    return x, row, value, at, inside


@triton.jit
def _forward(
    logits, index, invalid, nats, normalizer, rows, groups, values, token_stride, group_stride,
    MASKED: tl.constexpr, ROWS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    x, row, value, _, _ = _place(
        logits, invalid, rows, groups, values, token_stride, group_stride, MASKED, ROWS, VALUES
    )
    there = row < rows
    largest = tl.where(there, tl.max(x, axis=1)[:, None], 0.0)
    total = tl.where(there, tl.sum(tl.exp(x - largest), axis=1)[:, None], 1.0)
    chosen = tl.load(index + row, mask=there, other=-1)
    own = tl.sum(tl.where(value == chosen, x, 0.0), axis=1)[:, None]
    tl.store(nats + row, tl.log(total) + (largest - own), mask=there)  # so that a large common part cancels exactly
    tl.store(normalizer + row, tl.log(total) + largest, mask=there)


@triton.jit
def _backward(
    grad, logits, index, invalid, normalizer, d_logits, rows, groups, values, token_stride, group_stride,
    out_token_stride, out_group_stride, MASKED: tl.constexpr, ROWS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    x, row, value, _, inside = _place(
        logits, invalid, rows, groups, values, token_stride, group_stride, MASKED, ROWS, VALUES
    )
    there = row < rows
    p = tl.exp(x - tl.load(normalizer + row, mask=there, other=0.0))
    chosen = tl.load(index + row, mask=there, other=-1)
    d = tl.load(grad + row, mask=there, other=0.0) * (p - tl.where(value == chosen, 1.0, 0.0))
    at = row // groups * out_token_stride + row % groups * out_group_stride + value
    tl.store(d_logits + at, d.to(d_logits.dtype.element_ty), mask=inside)


def group_cross_entropy(logits: Tensor, index: Tensor, invalid: Tensor | None) -> Tensor:
    """As `cross_entropy.group_cross_entropy`."""
    return _GroupCrossEntropy.apply(logits, index, invalid)  # type: ignore[no-any-return]


def _tokens(x: Tensor) -> Tensor:
    """[..., G, U] as [tokens, G, U]; a view where strides allow it, and a product over groups leaves such ones."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(-1, *x.shape[-2:])


def _launch(kernel: Any, tensors: tuple[Tensor, ...], shape: torch.Size, strides: list[int], masked: bool) -> None:
    count, groups, values = shape
    rows, columns = tile(values, TILE)
    kernel[(triton.cdiv(count * groups, rows),)](
        *tensors, count * groups, groups, values, *strides, masked, rows, columns, num_warps=warps(rows, columns)
    )


class _GroupCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, invalid: Tensor | None) -> Tensor:
        x, index = _tokens(logits), index.contiguous()
        nats = torch.empty(index.shape, dtype=torch.float32, device=x.device)
        normalizer = torch.empty_like(nats)
        mask = index if invalid is None else invalid.contiguous().view(torch.uint8)  # not read without one
        strides = [x.stride(0), x.stride(1)]
        _launch(_forward, (x, index, mask, nats, normalizer), x.shape, strides, invalid is not None)
        ctx.save_for_backward(logits, index, mask, normalizer)
        ctx.masked = invalid is not None
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, index, mask, normalizer = ctx.saved_tensors
        x = _tokens(logits)
        same = x.data_ptr() == logits.data_ptr()  # not copied: keep the layout, which the product before wants
        out = torch.empty_like(logits, memory_format=torch.preserve_format if same else torch.contiguous_format)
        d = out.view(x.shape)
        strides = [x.stride(0), x.stride(1), d.stride(0), d.stride(1)]
        tensors = (grads[0].contiguous(), x, index, mask, normalizer, d)
        _launch(_backward, tensors, x.shape, strides, ctx.masked)
        return out, None, None
