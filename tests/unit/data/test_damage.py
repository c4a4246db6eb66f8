"""Shards that cannot be read: named with the place, or replaced, the same on every rank and after a resume."""

import dataclasses
import hashlib
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bit.data.batches import BatchStream
from megatron_bit.data.corpus import Corpus
from megatron_bit.data.manifest import FILE_NAME, Shard, Split, load_manifest
from megatron_bit.data.order import SampleOrder
from megatron_bit.data.stream import read_shard
from megatron_bit.errors import ShardError
from megatron_bit.io.files import write_atomic

SIZES = [333, 200, 128, 256, 90, 400, 150, 310]


@given(
    tokens=st.lists(st.integers(0, 300), min_size=2, max_size=12),
    shuffle_shards=st.integers(1, 14),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_only_samples_of_damaged_shards_are_replaced(tokens, shuffle_shards, shuffle, seed, data):
    whole = [index for index, count in enumerate(tokens) if count >= 10]
    if len(whole) < 2:
        return
    damaged = data.draw(st.frozensets(st.sampled_from(whole), min_size=1, max_size=len(whole) - 1))
    order = SampleOrder(tokens, seq_length=10, seed=seed, shuffle_shards=shuffle_shards, shuffle=shuffle)
    numbers = np.arange(2 * order.samples_per_epoch)
    before, after = order.locate_many(numbers), order.locate_many(numbers, damaged)
    hit = np.isin(before.shard, list(damaged))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[~hit], b[~hit])
    assert not np.isin(after.shard, list(damaged)).any()
    for number in numbers[hit].tolist():
        ((epoch, window),) = order.windows(number, number + 1)
        good = set(order.shards_of(epoch, window)) - damaged
        assert not good or int(after.shard[number]) in good
        assert int(after.sample[number]) < tokens[int(after.shard[number])] // 10
        assert [int(x) for x in order.locate_many(np.array([number]), damaged).shard] == [after.shard[number]]


@given(st.integers(0, 400), st.integers(1, 200), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_windows_are_those_that_the_samples_lie_in(first, count, shuffle_shards):
    order = SampleOrder(SIZES, seq_length=10, seed=3, shuffle_shards=shuffle_shards)
    location = order.locate_many(np.arange(first, first + count))
    windows = order.windows(first, first + count)
    assert windows == sorted(set(windows))
    shards = {(epoch, shard) for epoch, window in windows for shard in order.shards_of(epoch, window)}
    assert set(zip(location.epoch.tolist(), location.shard.tolist(), strict=True)) <= shards
    for epoch, window in windows:
        here = {(epoch, shard) for shard in order.shards_of(epoch, window)}
        assert here & set(zip(location.epoch.tolist(), location.shard.tolist(), strict=True))


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def corrupt(path):
    data = bytearray(path.read_bytes())
    at = data.rindex(b"\x93NUMPY")
    data[at : at + 6] = b"nothin"
    path.write_bytes(data)


def flipped(path):
    """One bit of a token: what is read is possible, and another text."""
    data = bytearray(path.read_bytes())
    data[data.rindex(b"\x93NUMPY") + 128] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


DAMAGE = {
    "truncated": truncated,
    "corrupt": corrupt,
    "flipped": flipped,
    "empty": empty,
    "gone": lambda path: path.unlink(),
}
SAYS = {
    "truncated": r"damaged after \d+ of 400 tokens, behind byte \d+ of \d+|ends after \d+ of 400 tokens, at byte \d+",
    "corrupt": r"damaged after \d+ of 400 tokens, behind byte [1-9]\d* of \d+",
    "flipped": r"is damaged; copy it again or prepare the data again \(its SHA-256 is [0-9a-f]{64}, the manifest",
    "empty": r"(after 0 of 400 tokens)",
    "gone": "cannot be opened",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_the_error_names_shard_and_place(make_data, how):
    manifest = make_data(SIZES)
    shard = manifest.split("train").shards[5]
    DAMAGE[how](manifest.shard_path(shard))
    with pytest.raises(ShardError, match=SAYS[how]) as caught:
        read_shard(manifest, shard)
    assert caught.value.sha256 == shard.sha256 and shard.file in str(caught.value)


def stream(manifest, dp_rank=0, dp_size=1, prefetch=2):
    return BatchStream(
        Corpus.of(manifest), "train", seq_length=10, seed=5, global_batch_size=12, micro_batch_size=2, dp_rank=dp_rank,
        dp_size=dp_size, shuffle_shards=3, prefetch=prefetch,
    )  # fmt: skip


def run(manifests, steps, cursor=0, damaged=()):
    """What the trainer does, with a rank for each folder: (tokens of all samples, what is damaged, replaced)."""
    streams = [stream(m, rank, len(manifests)) for rank, m in enumerate(manifests)]
    damaged, found, replaced, end = set(damaged), [], 0, cursor + 12 * steps
    while cursor < end:
        iterators = [s.checked_steps(cursor, damaged) for s in streams]
        while cursor < end:
            ranks = [next(iterator) for iterator in iterators]
            assert len({step.checked for step in ranks}) == 1, "the ranks do not meet"
            assert ranks[0].checked or not any(step.problems for step in ranks)
            news = {problem.sha256 for step in ranks for problem in step.problems}
            if news:
                damaged |= news
                break
            found += [ranks[r].batches[m].tokens for m in range(6 // len(ranks)) for r in range(len(ranks))]
            replaced += streams[0].samples.replaced(np.arange(cursor, cursor + 12), frozenset(damaged))
            cursor += 12
    for s in streams:
        s.close()
    return np.concatenate(found), damaged, replaced


@pytest.mark.parametrize("how", DAMAGE)
def test_one_rank_finds_the_damage_and_all_go_on_without(make_data, how):
    """Rank 1 of 3 has a damaged copy of one shard; all batches are those of one rank that has it damaged."""
    good, bad = make_data(SIZES), make_data(SIZES, name="copy")
    assert good.fingerprint == bad.fingerprint
    shard = bad.split("train").shards[5]
    DAMAGE[how](bad.shard_path(shard))
    tokens, damaged, replaced = run([good, bad, good], 40)
    alone, _, _ = run([bad], 40)
    np.testing.assert_array_equal(tokens, alone)
    assert damaged == {shard.sha256}
    undamaged, nothing, none = run([good], 40)
    changed = (tokens != undamaged).any(1)
    assert 0 < changed.sum() <= replaced and (nothing, none) == (set(), 0)
    location = stream(good).samples.locate_many(np.arange(480))
    assert not changed[location.shard != 5].any() and replaced == (location.shard == 5).sum()
    first, known, before = run([bad, good], 17)
    second, _, after = run([good], 23, cursor=17 * 12, damaged=known)  # repaired since: the run stays what it is
    np.testing.assert_array_equal(np.concatenate([first, second]), tokens)
    assert before + after == replaced


def test_too_many_are_no_accident(make_data):
    manifest = make_data(SIZES)
    shards = manifest.split("train").shards
    samples = stream(manifest).samples
    assert samples.too_many(frozenset({shards[0].sha256})) is None
    assert "2 of 8 shards" in samples.too_many(frozenset({shards[0].sha256, shards[1].sha256}))
    single = make_data([100], name="single")
    assert stream(single).samples.too_many(frozenset({single.split("train").shards[0].sha256})) is not None


def test_fewer_shards_than_ranks(make_data):
    manifest = make_data([400])
    found, _, _ = run([manifest] * 6, 7)
    expected, _, _ = run([manifest], 7)
    np.testing.assert_array_equal(found, expected)


def test_a_shard_without_documents_is_no_damage(make_data):
    """prepare writes none, other tools may."""
    manifest = make_data([333, 128])
    path = manifest.folder / "nothing.tar"
    tarfile.open(path, "w").close()
    nothing = Shard(path.name, 0, 0, 0, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    first, second = manifest.split("train").shards
    more = dataclasses.replace(manifest, splits={"train": Split((first, nothing, second))})
    write_atomic(manifest.folder / FILE_NAME, more.to_json().encode())
    assert load_manifest(manifest.folder) == more
    assert len(read_shard(more, nothing)) == 0
    assert run([more] * 2, 9)[1] == set()
