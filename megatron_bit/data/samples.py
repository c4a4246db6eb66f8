"""Sample number n of a run: which source, which shard of it, which tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from megatron_bit.data.corpus import Corpus
from megatron_bit.data.mixture import Mixture
from megatron_bit.data.order import SampleOrder
from megatron_bit.data.stream import ShardReader
from megatron_bit.errors import ShardError, UserError


class Place(NamedTuple):
    """Where samples lie, int64 [n] each (plain integers from `locate`)."""

    source: np.ndarray  # index into the sources that have samples of this split
    epoch: np.ndarray  # of the source
    shard: np.ndarray  # index into the split's shards
    sample: np.ndarray  # tokens [sample * seq_length, (sample + 1) * seq_length) of that shard


class Samples:
    """The samples of one split, mixed from all sources that have some."""

    def __init__(
        self, corpus: Corpus, split: str, *, seq_length: int, seed: int, shuffle_shards: int, shuffle: bool
    ) -> None:
        """Raises UserError: a source has no such split, or (of several: all) no sample of seq_length."""
        self.seq_length = seq_length
        self.eos_id = corpus.manifest.eos_id
        orders, shares, problem = [], [], None
        self.readers: list[ShardReader] = []
        for source, share in zip(corpus.sources, corpus.shares(seq_length), strict=True):
            manifest = source.manifest
            manifest.split(split)
            try:
                order = SampleOrder(
                    source.tokens[split].tolist(),
                    seq_length=seq_length,
                    seed=seed,
                    shuffle_shards=shuffle_shards,
                    shuffle=shuffle,
                    name=f"{manifest.name}, split {split}",
                )
            except UserError as error:
                if split == "train":
                    raise
                problem = error  # a small source of a mixture may have nothing held out
                continue
            orders.append(order)
            shares.append(share)
            # without a shuffle the order walks shard by shard: one in memory is enough
            capacity = shuffle_shards if shuffle else 1
            totals = source.tokens[split]
            self.readers.append(ShardReader(manifest, split, capacity, corpus.block_size, totals, corpus.verify))
        if not orders:
            assert problem is not None
            raise problem
        self.orders: list[SampleOrder] = orders
        self.mixture = Mixture(shares)

    @property
    def before_repeat(self) -> int:
        """How many samples there are before one of a source comes again: of one source, an epoch."""
        total = sum(self.mixture.shares)
        pairs = zip(self.orders, self.mixture.shares, strict=True)
        return min(order.samples_per_epoch * total // share for order, share in pairs)

    def locate(self, number: int) -> tuple[int, int, int, int]:
        """(source, epoch, shard index, sample in shard) of one sample."""
        source, epoch, shard, sample = (int(x[0]) for x in self.locate_many(np.array([number], dtype=np.int64)))
        return source, epoch, shard, sample

    def locate_many(self, numbers: np.ndarray, damaged: frozenset[str] = frozenset()) -> Place:
        """Where the samples with these numbers (int64 [n], >= 0) lie.

        damaged: SHA-256 of shards whose samples are replaced by others of their source (SampleOrder.locate_many).
        """
        source, own = self.mixture.divide(numbers)
        place = Place(source, *(np.empty_like(own) for _ in range(3)))
        for index, order in enumerate(self.orders):
            rows = np.flatnonzero(source == index)
            if len(rows):
                found = order.locate_many(own[rows], self.readers[index].indices(damaged))
                for column, values in zip(place[1:], found, strict=True):
                    column[rows] = values
        return place

    def gather(self, place: Place) -> np.ndarray:
        """Tokens of the samples there [n] as int64 [n, seq_length], records as uint8 [n, seq_length, bytes].

        Raises ShardError if a shard cannot be read.
        """
        seq_length, record = self.seq_length, self.readers[0].manifest.record_shape
        result = np.empty((len(place.sample), seq_length, *record), dtype=np.uint8 if record else np.int64)
        for source, reader in enumerate(self.readers):
            mine = place.source == source
            # shards in memory first: reading the next window's must not throw them out before their turn
            for shard in sorted(np.unique(place.shard[mine]).tolist(), key=lambda shard: shard not in reader):
                rows = np.flatnonzero(mine & (place.shard == shard))
                tokens = reader.tokens(shard)
                whole = tokens[: len(tokens) // seq_length * seq_length].reshape(-1, seq_length, *record)
                result[rows] = whole[place.sample[rows]]
        return result

    def replaced(self, numbers: np.ndarray, damaged: frozenset[str]) -> int:
        """How many of these samples are others than they would be without damage."""
        if not damaged:
            return 0
        place = self.locate_many(numbers)
        bad = [np.isin(place.shard, list(reader.indices(damaged))) for reader in self.readers]
        return int(sum((place.source == source) & rows for source, rows in enumerate(bad)).sum())  # type: ignore[union-attr]

    def windows(self, number: int, count: int) -> list[tuple[int, int, int]]:
        """The (source, epoch, window) that the samples from `number` on lie in."""
        first, last = self.mixture.before(number), self.mixture.before(number + count)
        return [
            (source, *window)
            for source, order in enumerate(self.orders)
            for window in order.windows(first[source], last[source])
        ]

    def check(self, windows: Iterable[tuple[int, int, int]], damaged: frozenset[str]) -> list[ShardError]:
        """Read all shards of these windows but the damaged ones; what is wrong with them."""
        problems = []
        for source, epoch, window in windows:
            reader = self.readers[source]
            for shard in self.orders[source].shards_of(epoch, window):
                if shard not in reader.indices(damaged):
                    try:
                        reader.tokens(shard)
                    except ShardError as error:
                        problems.append(error)
        return problems

    def too_many(self, damaged: frozenset[str]) -> str | None:
        """What is said when more than a tenth of a source's shards are damaged, which is no accident; else None."""
        for reader, order in zip(self.readers, self.orders, strict=True):
            bad = len(reader.indices(damaged))
            if bad > max(1, order.shards // 10) or bad >= order.shards:
                return f"{bad} of {order.shards} shards of {reader.manifest.name}"
        return None

    def fetch_ahead(self, number: int) -> None:
        """Begin to fetch the shards of remote folders that are needed from this sample on."""
        if not any(reader.manifest.remote for reader in self.readers):
            return
        before = self.mixture.before(number)
        for reader, order, own in zip(self.readers, self.orders, before, strict=True):
            reader.fetch_ahead(order.ahead(own))

    def close(self) -> None:
        """End what `fetch_ahead` has begun."""
        for reader in self.readers:
            if reader.manifest.remote is not None:
                reader.manifest.remote.close()
