"""Batches do not depend on data-parallel size, prefetch, or where a run was stopped and resumed."""

import gc
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bit.data.batches import BatchStream
from megatron_bit.data.corpus import Corpus
from megatron_bit.data.manifest import Manifest, Split
from megatron_bit.data.stream import ShardReader
from megatron_bit.errors import UserError

SEQ_LENGTH = 10
GLOBAL = 24
SHARDS = [333, 5, 128, 256, 90, 400]  # 119 samples an epoch: not a multiple of the batch


def stream(manifest, dp_rank=0, dp_size=1, micro=2, **options):
    options = {"seq_length": SEQ_LENGTH, "seed": 5, "shuffle_shards": 2, **options}
    return BatchStream(
        Corpus.of(manifest),
        options.pop("split", "train"),
        global_batch_size=options.pop("global_batch_size", GLOBAL),
        micro_batch_size=micro,
        dp_rank=dp_rank,
        dp_size=dp_size,
        **options,
    )


def take(batches, cursor, steps):
    """[[micro-batch, ...] of each step], the stream closed afterwards."""
    iterator = batches.steps(cursor)
    result = [next(iterator) for _ in range(steps)]
    batches.close()
    return result


def global_batches(manifest, dp_size, micro, cursor, steps, **options):
    """(sample [steps * GLOBAL], tokens [steps * GLOBAL, SEQ_LENGTH]) put together from all ranks."""
    ranks = [take(stream(manifest, rank, dp_size, micro, **options), cursor, steps) for rank in range(dp_size)]
    in_order = [
        ranks[rank][step][m]
        for step in range(steps)
        for m in range(GLOBAL // (dp_size * micro))
        for rank in range(dp_size)
    ]
    return np.concatenate([b.sample for b in in_order]), np.concatenate([b.tokens for b in in_order])


@pytest.mark.parametrize("dp_size,micro", [(1, 24), (2, 3), (3, 4), (4, 2), (6, 1), (6, 4), (1, 1)])
def test_the_same_sequence_for_every_data_parallel_size(make_data, dp_size, micro):
    manifest = make_data(SHARDS)
    steps = 12  # 288 samples: over two epoch borders
    samples, tokens = global_batches(manifest, dp_size, micro, 0, steps)
    expected = global_batches(manifest, 1, 2, 0, steps, prefetch=0)
    np.testing.assert_array_equal(samples, np.arange(steps * GLOBAL))
    np.testing.assert_array_equal(tokens, expected[1])


@pytest.mark.parametrize("located", [1, 30, 60, 1024])
def test_how_many_places_are_found_together_changes_nothing(make_data, monkeypatch, located):
    monkeypatch.setattr("megatron_bit.data.batches.LOCATED", located)
    manifest = make_data(SHARDS)
    reader = ShardReader(manifest, "train", capacity=len(SHARDS))
    batches = stream(manifest, micro=12)
    numbers = []
    for batch in [batch for step in take(batches, 48, 9) for batch in step]:
        for sample, tokens in zip(batch.sample.tolist(), batch.tokens, strict=True):
            _, _, shard, place = batches.samples.locate(sample)
            np.testing.assert_array_equal(tokens, reader.tokens(shard)[place * SEQ_LENGTH :][:SEQ_LENGTH])
            numbers.append(sample)
    assert numbers == list(range(48, 48 + 9 * GLOBAL))


def test_batches_hold_the_tokens_of_their_samples(make_data):
    manifest = make_data(SHARDS)
    reader = ShardReader(manifest, "train", capacity=len(SHARDS))
    batches = stream(manifest)
    seen = set()
    for batch in [batch for step in take(batches, 0, 5) for batch in step]:
        assert batch.tokens.dtype == np.int64 and batch.tokens.shape == (2, SEQ_LENGTH)
        for sample, tokens in zip(batch.sample, batch.tokens, strict=True):
            _, _, shard, place = batches.samples.locate(int(sample))
            expected = reader.tokens(shard)[place * SEQ_LENGTH : (place + 1) * SEQ_LENGTH]
            np.testing.assert_array_equal(tokens, expected)
            seen.add(shard)
    assert seen == {0, 2, 3, 4, 5}


@pytest.mark.parametrize("cursor", [24, 96, 120, 17, 12_345])
def test_resume_at_any_cursor_and_another_size(make_data, cursor):
    manifest = make_data(SHARDS)
    whole = global_batches(manifest, 1, 2, cursor, 8)
    before = global_batches(manifest, 2, 3, cursor, 3)
    after = global_batches(manifest, 6, 2, cursor + 3 * GLOBAL, 5)
    for part in (0, 1):
        np.testing.assert_array_equal(np.concatenate([before[part], after[part]]), whole[part])
    np.testing.assert_array_equal(whole[0], np.arange(cursor, cursor + 8 * GLOBAL))


def test_validation_goes_through_the_shards_in_order(make_data):
    manifest = make_data([40, 25])
    steps = take(stream(manifest, shuffle=False, global_batch_size=6, micro=6), 0, 1)
    reader = ShardReader(manifest, "train", capacity=2)
    expected = np.concatenate([reader.tokens(0)[:40], reader.tokens(1)[:20]]).reshape(6, 10)
    np.testing.assert_array_equal(steps[0][0].tokens, expected)


def test_a_prepared_folder_streams(prepared):
    batches = stream(prepared, split="validation", shuffle=False, global_batch_size=4, micro=4)
    tokens = take(batches, 0, 1)[0][0].tokens
    assert tokens.max() < prepared.vocab_size
    assert len(prepared.split("train").shards) > 2


@pytest.mark.parametrize("options", [{"micro": 5}, {"dp_size": 5}, {"micro": 0}, {"seq_length": 1000}])
def test_wrong_sizes_are_user_errors(make_data, options):
    with pytest.raises(UserError, match=r"global_batch_size is 24|seq_length 1000"):
        stream(make_data(SHARDS), **options)


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "batch-prefetch"]


def wait_until_no_threads():
    deadline = time.monotonic() + 5
    while prefetch_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not prefetch_threads()


def test_the_prefetch_thread_ends_with_close_and_with_a_new_call(make_data):
    batches = stream(make_data(SHARDS))
    iterator = batches.steps(0)
    next(iterator)
    assert len(prefetch_threads()) == 1
    for cursor in range(5):
        next(batches.steps(cursor))
    assert len(prefetch_threads()) == 1
    begin = time.monotonic()
    batches.close()
    assert time.monotonic() - begin < 1
    assert not prefetch_threads()
    assert next(iterator, None) is None


def test_the_prefetch_thread_ends_when_the_stream_is_dropped(make_data):
    batches = stream(make_data(SHARDS))
    next(batches.steps(0))
    assert prefetch_threads()
    del batches
    gc.collect()
    assert wait_until_no_threads()


def test_prefetch_stays_within_its_bound(make_data, monkeypatch):
    batches = stream(make_data(SHARDS), prefetch=3)
    made = []
    gather = batches.samples.gather
    monkeypatch.setattr(batches.samples, "gather", lambda *args: made.append(1) or gather(*args))
    iterator = batches.steps(0)
    next(iterator)
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # time for it to run on, if it would
    assert len(made) == 4  # one taken, three waiting
    batches.close()


def test_an_error_in_the_prefetch_thread_reaches_the_consumer(make_data):
    manifest = make_data([240, 240, 240])
    samples = stream(manifest, prefetch=0, shuffle=False).samples
    assert samples.locate(24)[2] == 1
    path = manifest.shard_path(manifest.split("train").shards[1])
    path.write_bytes(path.read_bytes()[:700])
    batches = stream(manifest, shuffle=False)
    iterator = batches.steps(0)
    assert next(iterator)[0].sample[0] == 0  # the batch before the damaged shard still arrives
    with pytest.raises(UserError, match=path.name):
        next(iterator)
    batches.close()


def test_no_more_shards_in_memory_than_the_window(make_data):
    batches = stream(make_data([100] * 12), shuffle_shards=3, prefetch=0)
    iterator = batches.steps(0)
    for _ in range(20):
        next(iterator)
        assert len(batches.samples.readers[0]._cache) <= 3


def test_each_shard_is_read_once_an_epoch(make_data, monkeypatch):
    import megatron_bit.data.stream as module

    reads = []
    read = module.read_shard
    monkeypatch.setattr(module, "read_shard", lambda *args: reads.append(args[1]) or read(*args))
    batches = stream(make_data([100] * 12), shuffle_shards=3, prefetch=0, global_batch_size=8, micro=8)
    iterator = batches.steps(0)
    for _ in range(15):  # 120 samples: one epoch
        next(iterator)
    assert len(reads) == 12


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two folders of random tokens with many ends of documents."""
    from mbit_data.tokenize import TokenizedDocument
    from mbit_data.write import SplitWriter

    made, values = [], np.random.default_rng(3)
    for number, sizes in enumerate(([333, 5, 128, 256], [90, 400])):
        folder = tmp_path_factory.mktemp(f"source{number}")
        shards = []
        for index, size in enumerate(sizes):
            writer = SplitWriter(folder, f"s{index}", shard_tokens=10**9)
            for i in range(0, size, 16):
                tokens = values.integers(1, 1000, min(16, size - i)).astype("uint16")
                tokens[-1] = 0
                writer.add(f"{i:03d}", TokenizedDocument("x.txt", i, tokens, len(tokens), b"", 0))
            shards += writer.finish().shards
        made.append(Manifest(folder, {"train": Split(tuple(shards))}, "none", "", 1000, 0, "uint16", {}, "0"))
    return made


@given(
    stops=st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 2]), st.integers(0, 3)),
        min_size=1,
        max_size=6,
    ),
    start=st.integers(0, 40),
    mixed=st.booleans(),
    block_size=st.sampled_from([1, 5]),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=40, deadline=None)
def test_stopped_anywhere_and_continued_at_any_size_it_is_one_sequence(sources, stops, start, mixed, block_size, seed):
    """Each stop: steps, data-parallel size, micro-batch and read-ahead of the stretch before it; an epoch has 72."""
    parts = [Corpus.of(manifest, block_size).sources[0] for manifest in sources]
    corpus = Corpus(tuple(parts) if mixed else (parts[0],), block_size)
    common = {
        "seq_length": 10,
        "seed": seed,
        "global_batch_size": GLOBAL,
        "shuffle_shards": 2,
        "start_blocks": block_size,
    }

    def stretch(cursor, steps, dp_size, micro, prefetch):
        ranks = []
        for rank in range(dp_size):
            batches = BatchStream(
                corpus, "train", dp_rank=rank, dp_size=dp_size, micro_batch_size=micro, prefetch=prefetch, **common
            )
            ranks.append(take(batches, cursor, steps))
        order = [(s, m, r) for s in range(steps) for m in range(GLOBAL // dp_size // micro) for r in range(dp_size)]
        found = [ranks[r][s][m] for s, m, r in order]
        return [np.concatenate([getattr(b, name) for b in found]) for name in ("sample", "tokens", "start")]

    total, cursor, parts_found = sum(stop[0] for stop in stops), start * GLOBAL, []
    whole = stretch(cursor, total, 1, GLOBAL, 0)
    for steps, dp_size, micro, prefetch in stops:
        parts_found.append(stretch(cursor, steps, dp_size, micro, prefetch))
        cursor += steps * GLOBAL
    for index, expected in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[index] for part in parts_found]), expected)
    np.testing.assert_array_equal(whole[0], np.arange(start * GLOBAL, cursor))
