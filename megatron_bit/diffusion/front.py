"""Noise that falls as a front through a block: from one group of bits after another to all of them together.

The N = K G groups of a block stand in reading order, and group j has a noise level of its own. How far it has come is
s_j, 0 where nothing is known of it and 1 where it is decided, in shares of the distribution F of noise levels:
ln sigma_j = F^-1(1 - s_j). A front of overlap w lets s_j(t) = clip((t (N - 1 + w) - j) / w, 0, 1), t from 0 to 1: about
w groups are on their way at a time. At w = 1 a group begins when those before it are decided, which is the chain; at
infinity they move together.

A causal head gives the log-prior f_j of a group's values from h and from what it is shown of the groups before; the
group's own noisy bits enter by the matched filter. Along a path -ln p(x | h) is at most

    1/2 integral sum_j (d gamma_j / dt) E || x_j - E[x_j | f_j, z_j] ||^2 dt  +  sum_j E[-ln p(x_j | f_j, z_j)],

gamma = 1 / sigma^2, the second term at sigma_min where the groups before j are decided: the line integral of I-MMSE
(Guo, Shamai and Verdu, 2005; noise that differs by dimension: arXiv 2312.13236), the groups decided one after another.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_bit.diffusion.noise import FRONT, block_uniforms


def progress(t: Tensor, groups: int, overlap: float) -> Tensor:
    """How far every group of a block has come at t: [...] to [..., K G]; overlap: at least 1, or inf."""
    if math.isinf(overlap):
        return t[..., None].expand(*t.shape, groups)
    front = t * (groups - 1 + overlap)
    return ((front[..., None] - torch.arange(groups, device=t.device)) / overlap).clamp(0, 1)


def drawn_progress(seed: int, sample: Tensor, block: Tensor, groups: int) -> Tensor:
    """How far the groups of blocks have come in training, float32 [n, b, K G]: a third each every group by itself
    anywhere; some decided and the others not begun; a front of any overlap from 1 to 4 N.

    sample: int64 [b]; block: int64 [n, b]. A function of (seed, sample, block, group) alone.
    """
    apart, of_block = block_uniforms(seed, FRONT, sample, block, groups)
    kind, share, width = (of_block[..., i, None] for i in range(3))
    overlap = (4.0 * groups) ** width
    place = torch.arange(groups, device=sample.device)
    front = ((share * (groups - 1 + overlap) - place) / overlap).clamp(0, 1)
    return torch.where(kind < 1 / 3, apart, torch.where(kind < 2 / 3, (apart < share).float(), front))
