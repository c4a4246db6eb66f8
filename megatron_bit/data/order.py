"""The global order of samples: a pure function of (seed, epoch, the split's shards, seq_length, window).

Samples are numbered 0, 1, 2, ... over the whole run; `locate` says which sample of which shard each one
is. Nothing here is a counter, and nothing grows with the number of tokens: per epoch the order of the
shards is an array of one integer a shard, and samples are permuted by arithmetic (`permutation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

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

    @property
    def shards(self) -> int:
        """How many there are with a sample at least."""
        return len(self._used)

    def ahead(self, global_index: int) -> list[int]:
        """The shards that are read from this sample on: those of its window, then those of the next one."""
        ((epoch, window),) = self.windows(global_index, global_index + 1)
        following = self.shards_of(epoch, window + 1) or self.shards_of(epoch + 1, 0)
        return list(dict.fromkeys((*self.shards_of(epoch, window), *following)))

    def locate(self, global_index: int) -> tuple[int, int, int]:
        """(epoch, shard index, sample in shard) of one sample."""
        location = self.locate_many(np.array([global_index], dtype=np.int64))
        return int(location.epoch[0]), int(location.shard[0]), int(location.sample[0])

    def windows(self, first: int, last: int) -> list[tuple[int, int]]:
        """The (epoch, window) that the samples first to last (exclusive) lie in, in order."""
        found: list[tuple[int, int]] = []
        while first < last:
            epoch, position = divmod(first, self.samples_per_epoch)
            window = self._slot(self._epoch(epoch), position) // self._window
            found.append((epoch, window))
            first += int(self._borders(self._epoch(epoch))[window + 1]) - position
        return found

    def shards_of(self, epoch: int, window: int) -> list[int]:
        """The shards of a window in their order."""
        return self._epoch(epoch).shards[window * self._window : (window + 1) * self._window].tolist()

    def locate_many(self, global_indices: np.ndarray, damaged: frozenset[int] = frozenset()) -> Location:
        """Where the samples with these global indices (int64 [n], >= 0) lie.

        damaged: shards whose samples are replaced by others: of the same window, or of the epoch if that has none.
        """
        indices = np.asarray(global_indices, dtype=np.int64)
        if indices.size and indices.min() < 0:
            raise ValueError(f"global sample index {indices.min()} is negative")
        epochs, positions = np.divmod(indices, self.samples_per_epoch)
        shards, samples = np.empty_like(indices), np.empty_like(indices)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            shards[chosen], samples[chosen] = self._locate_in_epoch(int(epoch), positions[chosen])
        for row in np.flatnonzero(np.isin(shards, list(damaged))) if damaged else ():
            shards[row], samples[row] = self._instead(int(epochs[row]), int(indices[row]), damaged)
        return Location(epochs, shards, samples)

    def _instead(self, epoch: int, index: int, damaged: frozenset[int]) -> tuple[int, int]:
        order = self._epoch(epoch)
        slots = np.arange(len(order.shards))
        good = ~np.isin(order.shards, list(damaged))
        here = good & (slots // self._window == self._slot(order, index % self.samples_per_epoch) // self._window)
        chosen = np.flatnonzero(here if here.any() else good)
        ends = np.cumsum(np.diff(order.starts)[chosen])
        place = derive_key("instead", self.seed, index) % int(ends[-1])
        slot = int(np.searchsorted(ends, place, side="right"))
        before = int(ends[slot - 1]) if slot else 0
        return int(order.shards[chosen[slot]]), place - before

    @property
    def _window(self) -> int:
        return self.shuffle_shards if self.shuffle else 1

    def _slot(self, order: _Epoch, position: int) -> int:
        """Whose place a position in the epoch has, if nothing is shuffled: of the same window in any case."""
        return int(np.searchsorted(order.starts, position, side="right")) - 1

    def _borders(self, order: _Epoch) -> np.ndarray:
        """First sample of each window, and one past the last."""
        return np.append(order.starts[: -1 : self._window], order.starts[-1])

    def _locate_in_epoch(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = self._epoch(epoch)
        if self.shuffle:
            positions = self._shuffle_in_windows(epoch, order, positions)
        slots = np.searchsorted(order.starts, positions, side="right") - 1
        return order.shards[slots], positions - order.starts[slots]

    def _shuffle_in_windows(self, epoch: int, order: _Epoch, positions: np.ndarray) -> np.ndarray:
        borders = self._borders(order)
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
