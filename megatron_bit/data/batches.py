"""Batches of one data-parallel rank. The only state is the number of samples consumed so far.

Global batch at cursor c is the samples c .. c + global_batch_size - 1 of the global order; micro-batch m of
data-parallel rank r holds c + (m * dp_size + r) * micro_batch_size + [0, micro_batch_size). So a step sees
the same samples for any dp_size, and a resume starts at the cursor without replaying anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_bit.data.manifest import Manifest
from megatron_bit.data.order import DEFAULT_SHUFFLE_SHARDS, SampleOrder
from megatron_bit.data.prefetch import Prefetcher
from megatron_bit.data.stream import ShardReader
from megatron_bit.errors import UserError


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    tokens: np.ndarray  # int64 [micro_batch, seq_length]; records: uint8 [micro_batch, seq_length, bytes]
    sample: np.ndarray  # int64 [micro_batch]: global sample index, unique over the run, counts on over epochs


class _BatchMaker:
    """Makes the batches. Apart from BatchStream, because the prefetch thread refers to this one: a
    BatchStream that nobody holds any more can be collected, and its thread ends with it."""

    def __init__(self, order: SampleOrder, reader: ShardReader, offsets: np.ndarray, global_batch_size: int):
        """offsets: int64 [micro-batches, micro_batch], this rank's samples relative to the cursor."""
        self.order = order
        self.reader = reader
        self.offsets = offsets
        self.global_batch_size = global_batch_size

    def steps(self, cursor: int) -> Iterator[list[Batch]]:
        while True:
            samples = cursor + self.offsets
            tokens = self.gather(samples.reshape(-1))
            tokens = tokens.reshape(*samples.shape, *tokens.shape[1:])
            yield [Batch(tokens[m], samples[m]) for m in range(len(samples))]
            cursor += self.global_batch_size

    def gather(self, samples: np.ndarray) -> np.ndarray:
        """Tokens of samples [n] as int64 [n, seq_length], records as uint8 [n, seq_length, bytes]."""
        seq_length = self.order.seq_length
        location = self.order.locate_many(samples)
        record = self.reader.record_shape
        result = np.empty((len(samples), seq_length, *record), dtype=np.uint8 if record else np.int64)
        # shards in memory first: reading the next window's must not throw them out before their turn
        for shard in sorted(np.unique(location.shard).tolist(), key=lambda shard: shard not in self.reader):
            rows = np.flatnonzero(location.shard == shard)
            tokens = self.reader.tokens(shard)
            whole = tokens[: len(tokens) // seq_length * seq_length].reshape(-1, seq_length, *record)
            result[rows] = whole[location.sample[rows]]
        return result


class BatchStream:
    """This rank's micro-batches of every global batch, from any cursor on, without end."""

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        *,
        seq_length: int,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        shuffle_shards: int = DEFAULT_SHUFFLE_SHARDS,
        shuffle: bool = True,
        prefetch: int = 2,
    ):
        """prefetch: global batches made ahead in a thread, 0 for none.

        Raises UserError: global_batch_size is no multiple of micro_batch_size * dp_size, or the split has
        no sample of seq_length.
        """
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank is {dp_rank}, dp_size {dp_size}")
        per_round = micro_batch_size * dp_size
        if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % per_round:
            raise UserError(
                f"global_batch_size is {global_batch_size}; it must be a positive multiple of "
                f"micro_batch_size * data-parallel size = {micro_batch_size} * {dp_size} = {per_round}"
            )
        if prefetch < 0:
            raise UserError(f"prefetch is {prefetch}; it must be 0 (off) or more")
        self.order = SampleOrder.of(
            manifest,
            split,
            seq_length=seq_length,
            seed=seed,
            shuffle_shards=shuffle_shards,
            shuffle=shuffle,
        )
        # without a shuffle the order walks shard by shard: one in memory is enough
        reader = ShardReader(manifest, split, capacity=shuffle_shards if shuffle else 1)
        rounds = np.arange(global_batch_size // per_round)[:, None]
        offsets = (rounds * dp_size + dp_rank) * micro_batch_size + np.arange(micro_batch_size)
        self._maker = _BatchMaker(self.order, reader, offsets, global_batch_size)
        self._prefetch = prefetch
        self._running: Prefetcher[list[Batch]] | None = None

    def steps(self, consumed_samples: int) -> Iterator[list[Batch]]:
        """Global batches from the cursor `consumed_samples` on; the next cursor is + global_batch_size.

        Each item is this rank's micro-batches of one global batch. One iterator at a time: a new call ends
        the one before. Raises UserError while iterating if a shard cannot be read.
        """
        if consumed_samples < 0:
            raise ValueError(f"consumed_samples is {consumed_samples}")
        self.close()
        if not self._prefetch:
            return self._maker.steps(consumed_samples)
        self._running = Prefetcher(self._maker.steps(consumed_samples), self._prefetch, name="batch-prefetch")
        return self._running

    def close(self) -> None:
        """End the prefetch thread, if one runs. `steps` may be called again afterwards."""
        if self._running is not None:
            self._running.close()
            self._running = None
