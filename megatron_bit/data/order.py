"""The global order of samples: a pure function of (seed, epoch, the split's shards, seq_length, window).

Samples are numbered 0, 1, 2, ... over the whole run; `locate` says which sample of which shard each one
is. Nothing here is a counter, and nothing grows with the number of tokens: per epoch the order of the
shards is an array of one integer a shard, and samples are permuted by arithmetic (`permutation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_bit.data.manifest import Manifest
from megatron_bit.data.permutation import derive_key, keyed_order, permute
from megatron_bit.errors import UserError

DEFAULT_SHUFFLE_SHARDS = 8


class Location(NamedTuple):
    """Where samples lie, int64 [n] each (plain integers from `locate`)."""

    epoch: np.ndarray
    shard: np.ndarray  # index into the split's shards
    sample: np.ndarray  # tokens [sample * seq_length, (sample + 1) * seq_length) of that shard


class _Epoch(NamedTuple):
    shards: np.ndarray  # int64 [used shards]: the shards in this epoch's order
    starts: np.ndarray  # int64 [used shards + 1]: first sample of each, counted within the epoch


class SampleOrder:
    """Each shard of T tokens gives T // seq_length samples; the rest of it is dropped (`dropped_tokens`).

    Per epoch the shards are permuted and cut into windows of `shuffle_shards`; the samples of a window are
    permuted among themselves, so that a reader needs one window of shards in memory. With `shuffle=False`
    every epoch goes through the shards in the order they were written.
    """

    def __init__(
        self,
        shard_tokens: Sequence[int],
        *,
        seq_length: int,
        seed: int = 0,
        shuffle_shards: int = DEFAULT_SHUFFLE_SHARDS,
        shuffle: bool = True,
        name: str = "the data",
    ):
        """shard_tokens: tokens of each shard. Raises UserError if no shard holds one whole sample."""
        if seq_length < 1:
            raise UserError(f"seq_length is {seq_length}; it must be at least 1")
        if shuffle_shards < 1:
            raise UserError(f"shuffle_shards is {shuffle_shards}; it must be at least 1")
        tokens = np.asarray(shard_tokens, dtype=np.int64).reshape(-1)
        samples = tokens // seq_length
        self.samples_per_epoch = int(samples.sum())
        if self.samples_per_epoch == 0:
            raise UserError(
                f"{name}: no sample of seq_length {seq_length}: {len(tokens)} shards, the longest with "
                f"{int(tokens.max(initial=0))} tokens; lower seq_length or prepare more text"
            )
        self.dropped_tokens = int((tokens - samples * seq_length).sum())
        self.seq_length = seq_length
        self.seed = seed
        self.shuffle_shards = shuffle_shards
        self.shuffle = shuffle
        self._used = np.flatnonzero(samples)
        self._samples = samples[self._used]
        self._epochs: dict[int, _Epoch] = {}

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        split: str,
        *,
        seq_length: int,
        seed: int = 0,
        shuffle_shards: int = DEFAULT_SHUFFLE_SHARDS,
        shuffle: bool = True,
    ) -> SampleOrder:
        """The order of one split of a prepared folder. Raises UserError as the constructor does."""
        return cls(
            [shard.tokens for shard in manifest.split(split).shards],
            seq_length=seq_length,
            seed=seed,
            shuffle_shards=shuffle_shards,
            shuffle=shuffle,
            name=f"{manifest.folder}, split {split}",
        )

    def locate(self, global_index: int) -> tuple[int, int, int]:
        """(epoch, shard index, sample in shard) of one sample."""
        location = self.locate_many(np.array([global_index], dtype=np.int64))
        return int(location.epoch[0]), int(location.shard[0]), int(location.sample[0])

    def locate_many(self, global_indices: np.ndarray) -> Location:
        """Where the samples with these global indices (int64 [n], >= 0) lie."""
        indices = np.asarray(global_indices, dtype=np.int64)
        if indices.size and indices.min() < 0:
            raise ValueError(f"global sample index {indices.min()} is negative")
        epochs, positions = np.divmod(indices, self.samples_per_epoch)
        shards, samples = np.empty_like(indices), np.empty_like(indices)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            shards[chosen], samples[chosen] = self._locate_in_epoch(int(epoch), positions[chosen])
        return Location(epochs, shards, samples)

    def _locate_in_epoch(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = self._epoch(epoch)
        if self.shuffle:
            positions = self._shuffle_in_windows(epoch, order, positions)
        slots = np.searchsorted(order.starts, positions, side="right") - 1
        return order.shards[slots], positions - order.starts[slots]

    def _shuffle_in_windows(self, epoch: int, order: _Epoch, positions: np.ndarray) -> np.ndarray:
        borders = np.append(order.starts[: -1 : self.shuffle_shards], order.starts[-1])
        windows = np.searchsorted(borders, positions, side="right") - 1
        shuffled = np.empty_like(positions)
        for window in np.unique(windows):
            chosen = windows == window
            start, size = borders[window], int(borders[window + 1] - borders[window])
            key = derive_key("samples", self.seed, epoch, int(window))
            shuffled[chosen] = start + permute(positions[chosen] - start, size, key)
        return shuffled

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            order = np.arange(len(self._used))
            if self.shuffle:
                order = keyed_order(len(order), derive_key("shards", self.seed, epoch))
            starts = np.concatenate([[0], np.cumsum(self._samples[order])]).astype(np.int64)
            while len(self._epochs) >= 2:  # a batch touches two epochs at most unless the data is tiny
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = _Epoch(self._used[order], starts)
        return self._epochs[epoch]
