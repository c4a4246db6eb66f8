"""Counter-based random numbers: Philox4x32-10 in plain torch integer arithmetic.

A draw depends on (key, counter) alone, never on a rank, a device or what was drawn before: that is what makes
noise independent of the parallel layout, and a resume exact. The function is Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3" (SC 2011), the generator that Triton's `tl.randint4x` uses too, so that a fused
kernel can draw the same noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox(key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words for every counter.

    Args:
        key: two 32-bit words.
        counter: four int64 tensors of broadcastable shapes with values in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1  # 64-bit products; they wrap to signed, the shifts below mask that away
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def seed_key(seed: int, stream: int = 0) -> tuple[int, int]:
    """The two key words of a 63-bit seed; `stream` separates uses (training, validation, sampling)."""
    return seed & _MASK, ((seed >> 32) ^ (stream * 0x9E3779B9)) & _MASK


def uniform(words: Tensor) -> Tensor:
    """32-bit words to float32 in the open interval (0, 1): the upper 23 bits, centred."""
    return ((words >> 9).float() + 0.5) * (1.0 / (1 << 23))


def normal(words: tuple[Tensor, ...]) -> Tensor:
    """Four words to four independent standard normals (Box-Muller), stacked in a new last dimension."""
    w0, w1, w2, w3 = words
    r0 = torch.sqrt(-2.0 * torch.log(uniform(w0)))
    r1 = torch.sqrt(-2.0 * torch.log(uniform(w2)))
    a0, a1 = uniform(w1) * (2 * math.pi), uniform(w3) * (2 * math.pi)
    return torch.stack((r0 * torch.cos(a0), r0 * torch.sin(a0), r1 * torch.cos(a1), r1 * torch.sin(a1)), dim=-1)
