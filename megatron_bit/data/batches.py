"""Batches of one data-parallel rank. The only state is the number of samples consumed so far.

Global batch at cursor c is the samples c .. c + global_batch_size - 1 of the global order; micro-batch m of
data-parallel rank r holds c + (m * dp_size + r) * micro_batch_size + [0, micro_batch_size). So a step sees
the same samples for any dp_size, and a resume starts at the cursor without replaying anything.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from megatron_bit.data.corpus import Corpus
from megatron_bit.data.documents import document_starts
from megatron_bit.data.order import DEFAULT_SHUFFLE_SHARDS
from megatron_bit.data.prefetch import Prefetcher
from megatron_bit.data.samples import Place, Samples
from megatron_bit.errors import ShardError, UserError

T = TypeVar("T")
LOCATED = 1024  # samples whose places are worked out together, which is quicker than one step's after another's


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    tokens: np.ndarray  # int64 [micro_batch, seq_length]; records: uint8 [micro_batch, seq_length, bytes]
    sample: np.ndarray  # int64 [micro_batch]: global sample index, unique over the run, counts on over epochs
    start: np.ndarray | None = None  # int64 [micro_batch, seq_length]: where each token's document begins, if asked for


@dataclass(frozen=True)
class Step:
    """This rank's part of one global batch, made with a look at every shard that it could be made of.

    The same steps are `checked` on every rank: those whose samples reach into a window of shards for the first time.
    """

    batches: list[Batch]  # empty if there are problems
    checked: bool
    problems: list[ShardError]


class _BatchMaker:
    """Makes the batches. Apart from BatchStream, because the prefetch thread refers to this one: a
    BatchStream that nobody holds any more can be collected, and its thread ends with it."""

    def __init__(self, samples: Samples, offsets: np.ndarray, global_batch_size: int, start_blocks: int | None):
        """offsets: int64 [micro-batches, micro_batch], this rank's samples relative to the cursor."""
        self.samples = samples
        self.offsets = offsets
        self.global_batch_size = global_batch_size
        self.start_blocks = start_blocks

    def steps(self, cursor: int) -> Iterator[list[Batch]]:
        return map(self._batches, self._steps(cursor, frozenset()))

    def checked_steps(self, cursor: int, damaged: frozenset[str]) -> Iterator[Step]:
        looked_at: set[tuple[int, int, int]] = set()
        for samples, place in self._steps(cursor, damaged):
            windows = self.samples.windows(cursor, self.global_batch_size)
            new = [window for window in windows if window not in looked_at]
            problems = self.samples.check(new, damaged)
            looked_at = set(windows)
            yield Step([] if problems else self._batches((samples, place)), bool(new), problems)
            cursor += self.global_batch_size

    def _steps(self, cursor: int, damaged: frozenset[str]) -> Iterator[tuple[np.ndarray, Place]]:
        """Sample numbers [micro-batches, micro_batch] of each step, and where they lie: found for many at a time."""
        shape, together = self.offsets.shape, max(1, LOCATED // self.offsets.size)
        while True:
            cursors = cursor + self.global_batch_size * np.arange(together)
            numbers = cursors[:, None, None] + self.offsets
            places = [column.reshape(together, -1) for column in self.samples.locate_many(numbers.reshape(-1), damaged)]
            for step in range(together):
                self.samples.fetch_ahead(int(cursors[step]))
                yield numbers[step].reshape(shape), Place(*(column[step] for column in places))
            cursor += together * self.global_batch_size

    def _batches(self, step: tuple[np.ndarray, Place]) -> list[Batch]:
        samples, place = step
        tokens = self.samples.gather(place)
        tokens = tokens.reshape(*samples.shape, *tokens.shape[1:])
        return [Batch(tokens[m], samples[m], self._starts(tokens[m])) for m in range(len(samples))]

    def _starts(self, tokens: np.ndarray) -> np.ndarray | None:
        if self.start_blocks is None:
            return None
        return document_starts(tokens, self.samples.eos_id, self.start_blocks)


class BatchStream:
    """This rank's micro-batches of every global batch, from any cursor on, without end."""

    def __init__(
        self,
        corpus: Corpus,
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
        start_blocks: int | None = None,
    ):
        """
        Args:
            prefetch: global batches made ahead in a thread, 0 for none.
            start_blocks: tokens of a block, for batches that say where documents begin; None: they do not.

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
        self.samples = Samples(
            corpus, split, seq_length=seq_length, seed=seed, shuffle_shards=shuffle_shards, shuffle=shuffle
        )
        rounds = np.arange(global_batch_size // per_round)[:, None]
        offsets = (rounds * dp_size + dp_rank) * micro_batch_size + np.arange(micro_batch_size)
        self._maker = _BatchMaker(self.samples, offsets, global_batch_size, start_blocks)
        self._prefetch = prefetch
        self._running: Prefetcher[Any] | None = None

    def steps(self, consumed_samples: int) -> Iterator[list[Batch]]:
        """Global batches from the cursor `consumed_samples` on; the next cursor is + global_batch_size.

        Each item is this rank's micro-batches of one global batch. One iterator at a time: a new call ends
        the one before. Raises UserError while iterating if a shard cannot be read.
        """
        return self._run(consumed_samples, self._maker.steps(consumed_samples))

    def checked_steps(self, consumed_samples: int, damaged: Collection[str]) -> Iterator[Step]:
        """Like `steps`, for a run that goes on without some shards: those with SHA-256 in `damaged`, whose samples are
        replaced, and more when all ranks know of them. After a step with problems there is nothing to be had from this
        iterator.
        """
        return self._run(consumed_samples, self._maker.checked_steps(consumed_samples, frozenset(damaged)))

    def _run(self, consumed_samples: int, steps: Iterator[T]) -> Iterator[T]:
        if consumed_samples < 0:
            raise ValueError(f"consumed_samples is {consumed_samples}")
        self.close()
        if not self._prefetch:
            return steps
        self._running = Prefetcher(steps, self._prefetch, name="batch-prefetch")
        return self._running

    def close(self) -> None:
        """End the prefetch thread, if one runs, and what is fetched ahead. `steps` may be called again afterwards."""
        if self._running is not None:
            self._running.close()
            self._running = None
        self.samples.close()
