"""Noisy blocks: blocks of a sequence that a chain evaluates once more, with noise on what their groups see of those
before them in the block (diffusion/front.py). They stand behind the sequence, and look at what is before them in it.

Letters of shapes: model/__init__.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bit.model.layers import PARTIAL, earlier, init_device, level_features, level_frequencies, linear
from megatron_bit.parallel.split import FREQUENCIES, noisy_blocks


class NoisyPlace(NamedTuple):
    """Which blocks they are."""

    block: Tensor  # int64 [Q, b], those of all TP ranks' parts of the sequence, one rank after the other
    mine: slice  # of Q: the q in this rank's part
    counts: Tensor  # bool [q, b]: not where a place is filled up, so that all ranks have as many
    first: int  # position at which this rank's part begins
    block_size: int  # K

    @property
    def positions(self) -> Tensor:
        """int64 [Q K, b], of their tokens in the sequence."""
        return _tokens(self.block, self.block_size)

    @property
    def rows(self) -> Tensor:
        """int64 [q K, b], of this rank's in its part of the sequence."""
        return _tokens(self.block[self.mine], self.block_size) - self.first


def every_block(
    samples: int, blocks: int, shards: int, shard: int, block_size: int, device: torch.device
) -> NoisyPlace:
    """All blocks of the sequence once more."""
    block, part = torch.arange(blocks, device=device)[:, None].expand(-1, samples), blocks // shards
    mine = slice(shard * part, (shard + 1) * part)
    counts = torch.ones(part, samples, dtype=torch.bool, device=device)
    return NoisyPlace(block, mine, counts, mine.start * block_size, block_size)


def one_in(every: int, sample: Tensor, blocks: int, shards: int, shard: int, block_size: int) -> NoisyPlace:
    """One of every so many blocks of the sequence; which of them is another one from sample to sample and along it."""
    part, device = blocks // shards, sample.device
    rank = torch.arange(shards, device=device)[:, None]
    q = noisy_blocks(every, blocks, shards)
    cell = (rank * part // every + torch.arange(q, device=device)).flatten()[:, None]  # [Q, 1]
    size = (blocks - cell * every).clamp(1, every)
    block = cell * every + (sample + cell) % size
    begin = (rank * part).expand(-1, q).reshape(-1, 1)
    mine = slice(shard * q, (shard + 1) * q)
    counts = (block >= begin) & (block < begin + part) & (cell * every < blocks)
    inside = torch.minimum(torch.maximum(block, begin), begin + part - 1)
    return NoisyPlace(inside, mine, counts[mine], shard * part * block_size, block_size)


def _tokens(block: Tensor, block_size: int) -> Tensor:
    """Blocks [n, b] to their tokens [n K, b]."""
    return (block[:, None] * block_size + torch.arange(block_size, device=block.device)[:, None]).flatten(0, 1)


def take(x: Tensor, positions: Tensor) -> Tensor:
    """[s, b, ...] at int64 positions [q K, b]: [q K, b, ...]. By an index: a gather has no fixed order backwards."""
    return x[positions, torch.arange(positions.shape[1], device=x.device)]


class NoisyBlocks(NamedTuple):
    """Blocks and the noise on what is seen of them; what is decided is seen as it is."""

    place: NoisyPlace
    decided: Tensor  # bool [Q K, b, G]
    log_sigma: Tensor  # float32 [q K, b, G]
    z: Tensor  # float32 [q K, b, B], noisy bits

    @property
    def mine(self) -> Tensor:
        """bool [q K, b, G], what is decided in this rank's."""
        k = self.place.block_size
        return self.decided[self.place.mine.start * k : self.place.mine.stop * k]


def known_before(known: Tensor, noisy: NoisyBlocks) -> Tensor:
    """int64 [S, b]: `known`, how many tokens before each may be looked at; in noisy blocks only those behind which all
    is decided."""
    place, k = noisy.place, noisy.place.block_size
    whole = noisy.decided.all(-1).unflatten(0, (-1, k))  # [Q, K, b]
    most = take(known, place.positions).unflatten(0, (-1, k))
    limited = [most[:, 0]]
    for i in range(1, k):
        limited.append(torch.where(whole[:, i - 1], torch.minimum(most[:, i], limited[-1] + 1), 0))
    return known.scatter(0, place.positions, torch.stack(limited, dim=1).flatten(0, 1))


class SeenLevels(nn.Module):
    """What a group of bits is told of the noise on what it sees, the groups before it in its token and the token
    before: nothing of what is decided, so that a row that sees no noise is the chain's."""

    def __init__(self, mcore: Any, width: int, groups: int) -> None:
        super().__init__()
        self.fc1 = linear(mcore, FREQUENCIES, width)
        self.fc2 = linear(mcore, width, width)
        shape, device = (2 * groups, width), init_device(mcore)
        self.slots = nn.Parameter(torch.empty(shape, dtype=mcore.params_dtype, device=device))  # own groups, then those
        setattr(self.slots, PARTIAL, mcore.sequence_parallel)  # of the token before
        self.frequency = level_frequencies(mcore)

    def forward(self, log_sigma: Tensor, decided: Tensor, block_size: int) -> Tensor:
        """float32 and bool [q K, b, G] to [q K, b, G, W]."""
        features = level_features(log_sigma, self.frequency).to(self.fc1.weight.dtype)
        told = self.fc1(features) * ~decided[..., None]
        own, before = self.slots.chunk(2)
        of_token = (told * before).sum(-2).unflatten(0, (-1, block_size))
        of_before = F.pad(of_token, (0, 0, 0, 0, 1, 0))[:, :-1].flatten(0, 1)  # none of a block's first token
        return self.fc2(F.silu(earlier(told * own) + of_before[..., None, :]))


def attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, place: NoisyPlace, window: int, start: Tensor | None
) -> Tensor:
    """Attention of noisy blocks, to themselves and to the clean tokens before them, causal in a sliding window.

    Args:
        q, k, v: [Q K, R, heads, d], of the noisy blocks; rows of a sample stand together.
        keys, values: [S, R, heads, d], of the sequence.
        start: int64 [b, S], the first position that a token may see.

    Returns:
        [Q K, R, heads * d].
    """
    size, rows, samples = place.block_size, q.shape[1], place.block.shape[1]
    at = place.positions.unflatten(0, (-1, size))  # [Q, K, b]
    back = at[:, :1] + torch.arange(1 - window, 0, device=q.device)[:, None]  # [Q, w - 1, b]
    seen = torch.cat((back, at), dim=1)  # positions of all keys
    reach = torch.zeros_like(at) if start is None else take(start.t(), place.positions).unflatten(0, (-1, size))
    mask = (seen[:, None] <= at[:, :, None]) & (seen[:, None] > at[:, :, None] - window)
    mask = mask & (seen[:, None] >= reach[:, :, None])  # [Q, K, w - 1 + K, b]
    here = back.clamp(min=0).flatten(0, 1).repeat_interleave(rows // samples, dim=1)  # [Q (w - 1), R]
    k, v = (
        torch.cat((take(old, here).unflatten(0, (len(at), -1)), new.unflatten(0, (-1, size))), dim=1)
        for old, new in ((keys, k), (values, v))
    )  # [Q, w - 1 + K, R, heads, d]
    # [Q R, heads, ., d]: SDPA has no fused form for five axes
    q, k, v = (t.permute(0, 2, 3, 1, 4).flatten(0, 1) for t in (q.unflatten(0, (-1, size)), k, v))
    mask = mask.permute(0, 3, 1, 2).repeat_interleave(rows // samples, dim=1).flatten(0, 1)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).unflatten(0, (-1, rows))
    return out.permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)
