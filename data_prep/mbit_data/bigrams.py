"""Counts of neighbouring tokens, and what a code costs a model that decides its bits apart, without any training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_bit.config import ModelConfig
from megatron_bit.data.manifest import Manifest, Shard
from megatron_bit.data.stream import read_shard
from megatron_bit.errors import UserError

MAX_PAIRS = 30_000_000  # distinct pairs kept: 3 GB with all that counting and search add to them
DISCOUNT = 0.75  # taken from every count and given to the unigram distribution (Ney et al. 1994)


@dataclass(frozen=True)
class Bigrams:
    """How often a token follows another one; sorted by (previous, following), every pair once."""

    vocab_size: int
    previous: np.ndarray  # int64 [n]
    following: np.ndarray  # int64 [n]
    count: np.ndarray  # int64 [n]
    tokens: int  # read
    dropped: int = 0  # pairs that were left out as too rare, to bound memory

    @property
    def total(self) -> int:
        return int(self.count.sum())

    def matrix(self, values: np.ndarray, dtype: torch.dtype) -> Tensor:
        """Sparse CSR [V, V] with `values` [n] at (previous, following)."""
        rows = np.concatenate(([0], np.cumsum(np.bincount(self.previous, minlength=self.vocab_size))))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls CSR a beta
            return torch.sparse_csr_tensor(
                torch.from_numpy(rows),
                torch.from_numpy(self.following),
                torch.from_numpy(values).to(dtype),
                (self.vocab_size, self.vocab_size),
                check_invariants=False,
            )


def count_bigrams(
    manifest: Manifest, split: str, max_tokens: int, advance: Callable[[int, int], object] = lambda size, tokens: None
) -> Bigrams:
    """Count the pairs in whole shards of a split, evenly spaced ones if they have more than `max_tokens`.

    `advance(bytes, tokens)` is called after every shard. Memory does not grow with the data (MAX_PAIRS): beyond it the
    rarest pairs so far are dropped. Raises UserError: no such split, nothing in it, a damaged shard.
    """
    size, read, dropped = manifest.vocab_size, 0, 0
    pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for shard in chosen_shards(manifest, split, max_tokens):
        ids = read_shard(manifest, shard).astype(np.int64)
        new, times = np.unique(ids[:-1] * size + ids[1:], return_counts=True)
        pairs, where = np.unique(np.concatenate((pairs, new)), return_inverse=True)
        counts = np.bincount(where, weights=np.concatenate((counts, times))).astype(np.int64)
        if len(pairs) > MAX_PAIRS:
            kept = np.sort(np.argsort(-counts, kind="stable")[:MAX_PAIRS])
            dropped += len(pairs) - MAX_PAIRS
            pairs, counts = pairs[kept], counts[kept]
        read += shard.tokens
        advance(shard.size, shard.tokens)
    if not len(pairs):
        raise UserError(f"the {split} split of {manifest.folder} is empty: there is nothing to count")
    return Bigrams(size, pairs // size, pairs % size, counts, read, dropped)


def chosen_shards(manifest: Manifest, split: str, max_tokens: int) -> Sequence[Shard]:
    """What `count_bigrams` reads: all shards, or evenly spaced ones of about `max_tokens` together, at least one."""
    shards = manifest.split(split).shards
    total = sum(shard.tokens for shard in shards)
    count = len(shards) if total <= max_tokens else max(1, len(shards) * max_tokens // total)
    return [shards[i * len(shards) // count] for i in range(count)]


class BitCost:
    """Held-out nats a token that it costs to decide a token's bits, or groups of them, apart.

    The model of language is a bigram with absolute discounting, p(v | u); what a group of bits is given u follows from
    it by adding up. With c_G the group's value, the cost is - sum_G ln p(c_G | u) + ln p(v | u), averaged over held-out
    pairs: in expectation the total correlation of the groups given u, which no model that decides them apart can avoid.
    """

    def __init__(self, train: Bigrams, held_out: Bigrams) -> None:
        size = train.vocab_size
        totals = np.bincount(train.previous, weights=train.count, minlength=size)
        kinds = np.bincount(train.previous, minlength=size)
        unigram = np.bincount(train.following, weights=train.count, minlength=size) + 0.5
        self._unigram = unigram / unigram.sum()
        self._back = np.where(totals > 0, DISCOUNT * kinds / np.maximum(totals, 1), 1.0)
        seen = (train.count - DISCOUNT) / totals[train.previous]
        self._seen = train.matrix(seen, torch.float64)
        self._held = held_out
        pairs, wanted = (b.previous * size + b.following for b in (train, held_out))
        at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
        found = np.where(pairs[at] == wanted, seen[at], 0.0)
        p = found + self._back[held_out.previous] * self._unigram[held_out.following]
        self.token = -float((held_out.count * np.log(p)).sum()) / held_out.total  # H(v | u), nats

    def apart(self, table: np.ndarray, group: int) -> float:
        """Nats a token for the code `table` (int8 [V, B]) when groups of at most `group` bits are decided apart."""
        held, total = self._held, 0.0
        for bits in np.split(table > 0, np.cumsum(group_sizes(table.shape[1], group))[:-1], axis=1):
            # values that occur, not all 2^g: a group may be the whole token
            _, value = np.unique(bits @ (1 << np.arange(bits.shape[1], dtype=np.int64)), return_inverse=True)
            for low in range(0, int(value.max()) + 1, 256):
                chosen = (value >= low) & (value < low + 256)
                one_hot = np.zeros((len(value), 256))
                one_hot[chosen, value[chosen] - low] = 1
                q = (self._seen @ torch.from_numpy(one_hot)).numpy() + self._back[:, None] * (self._unigram @ one_hot)
                pairs = chosen[held.following]
                p = q[held.previous[pairs], value[held.following[pairs]] - low]
                total -= float((held.count[pairs] * np.log(p)).sum())
        return total / held.total - self.token

    def row(self, table: np.ndarray, groups: Sequence[int]) -> Mapping[int, float]:
        """`apart` for several sizes of groups."""
        return {group: self.apart(table, group) for group in groups}


def group_sizes(bits: int, group: int) -> tuple[int, ...]:
    """Bits of each group, as `model.group_bits` cuts a token."""
    return ModelConfig(bits=bits, group_bits=min(group, bits)).group_sizes
