"""Laws of the global order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bit.data.order import SampleOrder
from megatron_bit.data.permutation import permute
from megatron_bit.errors import UserError

shards = st.lists(st.integers(0, 300), min_size=1, max_size=12).filter(lambda tokens: max(tokens) >= 20)
orders = st.fixed_dictionaries(
    {
        "shard_tokens": shards,
        "seq_length": st.integers(1, 20),
        "seed": st.integers(0, 2**40),
        "shuffle_shards": st.integers(1, 14),
        "shuffle": st.booleans(),
    }
)


@given(orders, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_sample_exactly_once_an_epoch(options, epoch):
    order = SampleOrder(**options)
    first = epoch * order.samples_per_epoch
    location = order.locate_many(np.arange(first, first + order.samples_per_epoch))
    assert (location.epoch == epoch).all()
    seen = sorted(zip(location.shard.tolist(), location.sample.tolist(), strict=True))
    seq_length = options["seq_length"]
    expected = [(s, i) for s, tokens in enumerate(options["shard_tokens"]) for i in range(tokens // seq_length)]
    assert seen == expected
    assert order.samples_per_epoch * seq_length + order.dropped_tokens == sum(options["shard_tokens"])


@given(orders, st.lists(st.integers(0, 5000), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_a_sample_lies_where_it_lies_whatever_is_asked_before_or_along(options, indices):
    together = SampleOrder(**options).locate_many(np.array(indices))
    order = SampleOrder(**options)
    one_by_one = [order.locate(index) for index in indices]
    assert [tuple(int(x) for x in row) for row in zip(*together, strict=True)] == one_by_one


@given(orders, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_window_of_shards_is_all_that_is_read_at_once(options, epoch):
    order = SampleOrder(**options)
    first = epoch * order.samples_per_epoch
    sequence = order.locate_many(np.arange(first, first + order.samples_per_epoch)).shard.tolist()
    window = options["shuffle_shards"] if options["shuffle"] else 1
    while sequence:  # cut off the samples of `window` shards: none of these shards may come again
        seen: set[int] = set()
        end = next(
            (i for i, shard in enumerate(sequence) if len(seen | {shard}) > window or seen.add(shard)),
            len(sequence),
        )
        assert not seen & set(sequence[end:])
        sequence = sequence[end:]


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@settings(max_examples=80, deadline=None)
def test_permutation_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permutation_of_a_large_range_needs_no_list():
    size = 10**15
    result = permute(np.arange(size - 1000, size), size, key=1)
    assert len(set(result.tolist())) == 1000
    assert result.min() >= 0 and result.max() < size
    assert result.std() > 0.2 * size  # uniform: 0.29


def places(order, indices):
    """[(shard, sample), ...]"""
    location = order.locate_many(indices)
    return list(zip(location.shard.tolist(), location.sample.tolist(), strict=True))


def test_epochs_and_seeds_differ_but_repeat():
    tokens = [1000] * 20
    order = SampleOrder(tokens, seq_length=10, seed=1, shuffle_shards=4)
    n = order.samples_per_epoch
    first, second = (list(zip(*order.locate_many(np.arange(e * n, (e + 1) * n))[1:], strict=True)) for e in (0, 1))
    assert first != second
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 0.02 * n
    windows = [{shard for shard, _ in epoch[:400]} for epoch in (first, second)]
    assert len(windows[0]) == len(windows[1]) == 4 and windows[0] != windows[1]
    other = SampleOrder(tokens, seq_length=10, seed=2, shuffle_shards=4)
    assert places(other, np.arange(n)) != first
    again = SampleOrder(tokens, seq_length=10, seed=1, shuffle_shards=4)
    assert places(again, np.arange(n)) == first


def test_shuffled_samples_are_spread_over_their_window():
    order = SampleOrder([8000] * 8, seq_length=10, seed=3)
    early = order.locate_many(np.arange(800))  # the first eighth of the window
    counts = np.bincount(early.shard, minlength=8)
    assert counts.min() > 60 and counts.max() < 145  # 100 expected, deviation 9.4
    assert abs(early.sample.mean() - 399.5) < 30  # deviation 8


def test_the_order_is_the_same_on_every_machine_and_version():
    """A changed order breaks the resumption of every run under way: raise the format version with it."""
    pinned = [(0, 0, 4), (0, 3, 2), (0, 0, 1), (0, 2, 4), (1, 3, 0), (1, 3, 2), (66, 2, 4)]
    order = SampleOrder([50, 9, 70, 31], seq_length=10, seed=7, shuffle_shards=2)
    assert [order.locate(i) for i in (0, 1, 2, 14, 15, 16, 1000)] == pinned


def test_sequential_order():
    order = SampleOrder([25, 5, 30], seq_length=10, shuffle=False)
    expected = [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    assert [order.locate(i)[1:] for i in range(5)] == expected
    assert order.locate(7) == (1, 2, 0)
    assert order.dropped_tokens == 10


@pytest.mark.parametrize("tokens", [[], [9, 3]])
def test_no_sample_is_a_user_error(tokens):
    with pytest.raises(UserError, match="seq_length 10"):
        SampleOrder(tokens, seq_length=10)


def test_locating_in_a_large_corpus_is_quick_and_small():
    """10,000 shards of 10 M tokens: no list of samples is made, and any position costs the same."""
    import time
    import tracemalloc

    order = SampleOrder([10**7] * 10_000, seq_length=1000, seed=1)
    tracemalloc.start()
    begin = time.perf_counter()
    order.locate_many(np.arange(64) + 7 * order.samples_per_epoch + 55_555_555)
    seconds, peak = time.perf_counter() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000  # bytes; a permuted list of the epoch's samples would be 800 MB
    assert seconds < 1
