"""Ids -> bits -> noised bits -> the head's input projection in Triton, in one pass.

The same Philox words as the plain form (megatron_bit/diffusion/noised.py), bit for bit, for a word is a function of
global indices alone; sines and logarithms are the device's own. The bits and z come out too: the loss needs them,
and they are 5 B bytes a row beside the projection's 2 W. For the same reason the backward pass reads z again rather
than draw it: the loss keeps z in any case, and the weight's gradient is then one product as of any linear layer.
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

TILE, WEIGHTS = 1024, 8192  # noised bits of a program, and the weights that it multiplies them with at once, at most


@triton.jit
def _uniform(words):
    """32-bit words to (0, 1): the upper 23 bits, centred; exact in float32."""
    return ((words >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)


@triton.jit
def _normal(sample, block, level, element, key0, key1):
    """Standard normal of element `element` of a block: word pair and half of the pair are its two lowest bits."""
    zero = (level + element) * 0
    w0, w1, w2, w3 = tl.philox_impl(
        (level * 65536 + element // 4).to(tl.uint32), (zero + block).to(tl.uint32), (zero + sample).to(tl.uint32),
        (zero + (sample >> 32)).to(tl.uint32), (zero + key0).to(tl.uint32), (zero + key1).to(tl.uint32),
    )  # fmt: skip
    later = element % 4 >= 2
    radius = tl.sqrt(-2.0 * tl.log(_uniform(tl.where(later, w2, w0))))
    angle = _uniform(tl.where(later, w3, w1)) * 6.283185307179586
    return radius * tl.where(element % 2 == 0, tl.cos(angle), tl.sin(angle))


@triton.jit
def _forward(
    ids, table, log_sigma, sample, weight, x, z, projected, key0, key1, first_block, rows, batch, samples, block_size,
    bits, width, weight_stride, PROJECT: tl.constexpr, TF32: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
    WIDTH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]  # of [s, b, M]
    bit = tl.arange(0, BITS)[None, :]
    there, inside = row < rows, (row < rows) & (bit < bits)
    token, level = row // samples, row % samples
    position, place = token // batch, token % batch
    chunk = position // block_size  # of this rank
    code = tl.load(ids + token, mask=there, other=0)
    value = tl.load(table + code * bits + bit, mask=inside, other=0)
    tl.store(x + token * bits + bit, value, mask=inside & (level == 0))
    sigma = tl.exp(tl.load(log_sigma + (chunk * batch + place) * samples + level, mask=there, other=0.0))
    number = tl.load(sample + place, mask=there, other=0)
    eps = _normal(number, first_block + chunk, level, position % block_size * bits + bit, key0, key1)
    noised = value.to(tl.float32) + sigma * eps
    tl.store(z + row * bits + bit, noised, mask=inside)
    if PROJECT:
        given = tl.where(inside, noised * tl.rsqrt(1.0 + sigma * sigma), 0.0)
        given = given.to(weight.dtype.element_ty).to(tl.float32)  # rounded as the plain form rounds it
        for i in range(TILES):
            column = i * WIDTH + tl.arange(0, WIDTH)[None, :]
            at = column * weight_stride + tl.arange(0, BITS)[:, None]
            there_too = (tl.arange(0, BITS)[:, None] < bits) & (column < width)
            w = tl.load(weight + at, mask=there_too, other=0.0).to(tl.float32)
            # bfloat16 is exact in tf32
            out = tl.dot(given, w, input_precision="tf32" if TF32 else "ieee")
            at = row * width + column
            tl.store(projected + at, out.to(projected.dtype.element_ty), mask=there & (column < width))


def noised_bits(
    ids: Tensor, table: Tensor, log_sigma: Tensor, sample: Tensor, weight: Tensor | None, key: tuple[int, int],
    first_block: int, block_size: int,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """As megatron_bit's `diffusion.noised.noised_bits`."""
    if weight is None:
        return (*_draw(ids, table, log_sigma, sample, None, key, first_block, block_size)[:2], None)
    return _NoisedBits.apply(ids, table, log_sigma, sample, weight, key, first_block, block_size)  # type: ignore


def _draw(
    ids: Tensor, table: Tensor, log_sigma: Tensor, sample: Tensor, weight: Tensor | None, key: tuple[int, int],
    first_block: int, block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (length, batch), samples, bits = ids.shape, log_sigma.shape[-1], table.shape[1]
    ids, table, log_sigma, sample = (t.contiguous() for t in (ids, table, log_sigma, sample))
    x = torch.empty(length, batch, bits, dtype=torch.int8, device=ids.device)
    z = torch.empty(length, batch, samples, bits, dtype=torch.float32, device=ids.device)
    width = 0 if weight is None else weight.shape[0]
    given = z if weight is None else weight if weight.stride(1) == 1 else weight.contiguous()
    projected = torch.empty(length, batch, samples, width, dtype=given.dtype, device=ids.device)
    count, columns = length * batch * samples, max(16, triton.next_power_of_2(bits))  # a product has 16 at least
    rows, part = max(16, TILE // columns), min(128, WEIGHTS // columns)
    _forward[(triton.cdiv(count, rows),)](
        ids, table, log_sigma, sample, given, x, z, projected, *key, first_block, count, batch, samples, block_size,
        bits, width, given.stride(0), weight is not None, given.dtype != torch.float32, rows, columns, part,
        triton.cdiv(width, part), num_warps=4,
    )  # fmt: skip
    return x, z, projected


class _NoisedBits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, table: Tensor, log_sigma: Tensor, sample: Tensor, weight: Tensor, key: tuple[int, int],
        first_block: int, block_size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        x, z, projected = _draw(ids, table, log_sigma, sample, weight, key, first_block, block_size)
        ctx.mark_non_differentiable(x, z)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, log_sigma)
        ctx.block_size, ctx.dtype = block_size, weight.dtype
        return x, z, projected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, log_sigma = ctx.saved_tensors
        sigma = log_sigma.exp().repeat_interleave(ctx.block_size, dim=0)[..., None]
        given = (z * torch.rsqrt(1.0 + sigma * sigma)).to(ctx.dtype)
        # one product, as of any linear layer: its sums over rows are in the library's fixed order
        return None, None, None, None, grads[2].flatten(0, -2).t() @ given.flatten(0, -2), None, None, None
