"""Groups of bits, and records that are nothing else."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_bitlm import BitLMConfig


def group_slices(config: BitLMConfig) -> list[slice]:
    ends = list(itertools.accumulate(config.group_sizes))
    return [slice(end - size, end) for end, size in zip(ends, config.group_sizes, strict=True)]


def table_rows(config: BitLMConfig) -> int:
    """Rows of a table with one for each value of each group; all groups have as many as the largest one needs."""
    return len(config.group_sizes) * 2 ** max(config.group_sizes)


def group_values(config: BitLMConfig, bits: Tensor) -> Tensor:
    """Bits [..., B] to the values of the groups, int64 [..., G]; a group's first bit counts most."""
    values = []
    for part, size in zip(group_slices(config), config.group_sizes, strict=True):
        weight = 2 ** torch.arange(size - 1, -1, -1, device=bits.device)
        values.append(((bits[..., part] > 0) * weight).sum(-1))
    return torch.stack(values, dim=-1)


def codes_of(size: int, like: Tensor) -> Tensor:
    """[2^size, size]: the bits of every value of a group."""
    value = torch.arange(2**size, device=like.device)
    digits = torch.arange(size - 1, -1, -1, device=like.device)
    return ((value[:, None] >> digits) & 1).to(like.dtype) * 2 - 1


def bits_of(config: BitLMConfig, values: Tensor) -> Tensor:
    """Values of the groups int64 [..., G] to bits float32 [..., B]."""
    like = torch.zeros((), device=values.device)
    sizes = enumerate(config.group_sizes)
    return torch.cat([codes_of(size, like)[values[..., i]] for i, size in sizes], dim=-1)


def spread(config: BitLMConfig, x: Tensor) -> Tensor:
    """What groups have, [..., G], to each of their bits, [..., B]."""
    return x.repeat_interleave(torch.tensor(config.group_sizes, device=x.device), dim=-1)


def pack(bits: Tensor) -> Tensor:
    """Bits [..., B] (above 0 or not) to records uint8 [..., ceil(B / 8)]; what is left of the last byte is 0."""
    ones = F.pad((bits > 0).to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (ones << torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def unpack(records: Tensor, bits: int) -> Tensor:
    """Records uint8 [..., ceil(B / 8)] to bits int8 [..., B] of -1 and +1."""
    ones = (records[..., None] >> torch.arange(7, -1, -1, dtype=torch.uint8, device=records.device)) & 1
    return ones.flatten(-2)[..., :bits].to(torch.int8) * 2 - 1


def fill_front(tokens: Tensor, count: int, value: int) -> Tensor:
    """Tokens [b, S] or records [b, S, bytes] with so many more in front (or without so many, below 0)."""
    return F.pad(tokens, (*[0, 0] * (tokens.dim() - 2), count, 0), value=value)
