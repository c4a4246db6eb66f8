"""Ids to noised bits, and those into the head: what kernels/mbit_kernels/triton_noised_bits.py does in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bit.diffusion.noise import keyed_gaussian


def noised_bits(
    ids: Tensor, table: Tensor, log_sigma: Tensor, sample: Tensor, weight: Tensor | None, key: tuple[int, int],
    first_block: int, block_size: int,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Bits, z = bits + sigma eps, and z / sqrt(1 + sigma^2) through a linear layer.

    Args:
        ids: int64 [s, b], rows of the table.
        table: int8 [V, B] of -1 and +1.
        log_sigma: float32 [n, b, M], one level a block, n = s / block_size.
        sample: int64 [b], global sample indices.
        weight: [W, B] of the layer, which is the only argument with a gradient; None: no layer.
        key: two 32-bit words of Philox (`philox.seed_key`).
        first_block: of the sequence, that this rank holds.

    Returns:
        int8 [s, b, B], float32 [s, b, M, B], and [s, b, M, W] in the weight's dtype, or None.
    """
    blocks, _, samples = log_sigma.shape
    x, sigma = table[ids], token_sigma(log_sigma, block_size)
    eps = keyed_gaussian(key, sample, first_block, blocks, samples, block_size, table.shape[1])
    z = x[:, :, None] + sigma * eps
    return x, z, None if weight is None else F.linear(network_input(z, sigma).to(weight.dtype), weight)


def token_sigma(log_sigma: Tensor, block_size: int) -> Tensor:
    """Sigma of every token, [s, b, M, 1], from ln sigma of its block, [n, b, M]."""
    return log_sigma.exp().repeat_interleave(block_size, dim=0)[..., None]


def network_input(z: Tensor, sigma: Tensor) -> Tensor:
    """z / sqrt(1 + sigma^2), of unit variance: float32 [s, b, M, B]; sigma as of `token_sigma`."""
    return z * torch.rsqrt(1.0 + sigma * sigma)
