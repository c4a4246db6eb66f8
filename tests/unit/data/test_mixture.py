"""Several sources: exact shares, every sample of each source in its own order, one tokenizer."""

import dataclasses
import hashlib
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bit.config import load_config
from megatron_bit.data.batches import BatchStream
from megatron_bit.data.corpus import Corpus, Source, open_corpus
from megatron_bit.data.manifest import FILE_NAME, load_manifest
from megatron_bit.data.mixture import Mixture
from megatron_bit.errors import UserError
from megatron_bit.io.files import write_atomic

shares = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@given(shares, st.integers(0, 10**15))
@settings(max_examples=60, deadline=None)
def test_exactly_the_shares_of_every_round_and_each_source_in_order(shares, first):
    mixture, total = Mixture(shares), sum(shares)
    first = first // total * total
    source, before = mixture.divide(np.arange(first, first + total))
    for number, share in enumerate(shares):
        start = first // total * share
        assert before[source == number].tolist() == list(range(start, start + share))


@given(shares, st.lists(st.integers(0, 2**62), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_a_number_has_its_source_whatever_is_asked_along(shares, numbers):
    together = Mixture(shares).divide(np.array(numbers))
    alone = [Mixture(shares).divide(np.array([number])) for number in numbers]
    assert together[0].tolist() == [int(source[0]) for source, _ in alone]
    assert together[1].tolist() == [int(before[0]) for _, before in alone]


@given(shares, st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_the_shares_hold_at_every_moment(shares, count):
    """Every beginning of the run has as many of each source as its share says, within as many as there are sources."""
    source, _ = Mixture(shares).divide(np.arange(count))
    for number, share in enumerate(shares):
        assert abs((source == number).sum() - count * share / sum(shares)) < len(shares)


@given(shares, st.integers(0, 500))
@settings(max_examples=60, deadline=None)
def test_what_came_before_is_what_was_divided(shares, number):
    source, _ = Mixture(shares).divide(np.arange(number))
    assert Mixture(shares).before(number) == np.bincount(source, minlength=len(shares)).tolist()


def test_fractions_and_large_shares_are_exact():
    assert Mixture([Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]).shares == [7, 2, 1]
    big = [10**15 + 1, 3 * 10**15]
    source, before = Mixture(big).divide(np.array([sum(big) - 1, sum(big)]))
    assert source.tolist() == [0, 1] and before.tolist() == [big[0] - 1, big[1]]


SIZES = ([500, 300], [200], [90, 60])  # 80, 20 and 15 samples of 10


def three(make_data, **settings):
    manifests = [make_data(sizes, name=f"data{i}") for i, sizes in enumerate(SIZES)]
    return changed(Corpus(tuple(Source(m, Corpus.of(m).sources[0].tokens) for m in manifests)), **settings)


def changed(corpus, **settings):
    """With weight=(1, 2, 3) or the like."""
    each = [{key: values[i] for key, values in settings.items()} for i in range(3)]
    sources = (dataclasses.replace(s, **values) for s, values in zip(corpus.sources, each, strict=True))
    return dataclasses.replace(corpus, sources=tuple(sources))


def stream(corpus, dp_rank=0, dp_size=1, micro=1, **options):
    return BatchStream(
        corpus, "train", seq_length=10, seed=3, global_batch_size=12, micro_batch_size=micro, dp_rank=dp_rank,
        dp_size=dp_size, **options,
    )  # fmt: skip


def test_shares_of_sizes_weights_epochs_and_temperature(make_data):
    corpus = three(make_data)
    assert Mixture(corpus.shares(10)).shares == [16, 4, 3]
    weighted = changed(corpus, weight=(1, 0.5, 2))
    assert Mixture(weighted.shares(10)).shares == [2, 1, 4]
    epochs = changed(corpus, epochs=(1, 4, 2))
    assert Mixture(epochs.shares(10)).shares == [8, 8, 3]
    tempered = dataclasses.replace(corpus, temperature=2.0).shares(10)
    assert float(tempered[1] / tempered[0]) == pytest.approx((20 / 80) ** 0.5, rel=1e-4)
    prints = {c.fingerprint for c in (corpus, weighted, epochs, dataclasses.replace(corpus, temperature=2.0))}
    assert len(prints) == 4


def test_exact_epochs_are_exact(make_data):
    """Once, four times and twice: after 80 + 80 + 30 samples every sample of each source was there as often."""
    samples = stream(three(make_data, epochs=(1, 4, 2))).samples
    place = samples.locate_many(np.arange(190))
    rows = list(zip(place.source.tolist(), place.shard.tolist(), place.sample.tolist(), strict=True))
    counts = {row: rows.count(row) for row in rows}
    assert len(counts) == 115 and all(counts[row] == (1, 4, 2)[row[0]] for row in counts)
    assert samples.before_repeat == 20 * 190 // 80  # the second source comes to its end first


@pytest.mark.parametrize("dp_size,micro", [(2, 2), (3, 1), (6, 2)])
def test_the_same_sequence_for_every_size_and_from_any_cursor(make_data, dp_size, micro):
    corpus = three(make_data, weight=(1, 2, 3))
    whole = stream(corpus, micro=12).steps(0)
    expected = np.concatenate([next(whole)[0].tokens for _ in range(9)])
    ranks = []
    for rank in range(dp_size):
        first, last = (stream(corpus, rank, dp_size, micro) for _ in range(2))
        steps = [next(it) for it in [first.steps(0)] for _ in range(4)]
        steps += [next(it) for it in [last.steps(48)] for _ in range(5)]
        ranks.append(steps)
        first.close(), last.close()
    rounds = range(12 // dp_size // micro)
    found = [ranks[rank][step][m].tokens for step in range(9) for m in rounds for rank in range(dp_size)]
    np.testing.assert_array_equal(np.concatenate(found), expected)


def test_a_mixture_of_one_is_the_folder_alone(make_data):
    manifest = make_data([500, 300])
    alone, mixed = (
        stream(corpus, prefetch=0).steps(24)
        for corpus in (Corpus.of(manifest), Corpus((Source(manifest, Corpus.of(manifest).sources[0].tokens, 0.3),)))
    )
    for _ in range(8):
        for a, b in zip(next(alone), next(mixed), strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)


def data_of(*sources, **keys):
    overrides = [f"data.sources={json.dumps(list(sources))}", *(f"data.{key}={value}" for key, value in keys.items())]
    return load_config(preset="laptop", overrides=overrides).data


def test_sources_by_configuration(make_data):
    paths = [str(make_data(sizes, name=f"data{i}").folder) for i, sizes in enumerate(SIZES)]
    data = data_of(*({"path": p, "weight": w} for p, w in zip(paths, (1, 2, 3), strict=True)))
    corpus = open_corpus(data, 4, check=True)
    assert Mixture(corpus.shares(10)).shares == [1, 2, 3] and data.folders == tuple(paths)
    assert corpus.manifest.folder == corpus.sources[0].manifest.folder


@pytest.mark.parametrize(
    ("sources", "keys", "message"),
    [
        ([{"path": "a", "weight": 1}, {"path": "b"}], {}, "weight is set for 1 of 2 sources"),
        ([{"path": "a", "weight": 1, "epochs": 2}], {}, "both weight and epochs"),
        ([{"path": "a", "weight": 0}], {}, r"data.sources.0.weight = 0"),
        ([{"path": "a", "wieght": 1}], {}, "wieght"),
        ([{"path": "a"}], {"path": "b"}, "path 'b' and sources are both set"),
        ([{"path": "a", "weight": 1}, {"path": "b", "weight": 1}], {"temperature": 2}, "temperature 2"),
        ([], {"temperature": 2}, "temperature 2"),
    ],
)
def test_sources_that_make_no_sense(sources, keys, message):
    with pytest.raises(UserError, match=message):
        data_of(*sources, **keys)


def test_sources_of_different_tokenizers_are_refused_with_both_hashes(make_data):
    first, second = make_data([100], name="a"), make_data([100], name="b")
    second.tokenizer_path.write_bytes(b"other")
    digest = hashlib.sha256(b"other").hexdigest()
    other = dataclasses.replace(second, tokenizer_sha256=digest)
    write_atomic(second.folder / FILE_NAME, other.to_json().encode())
    load_manifest(second.folder)
    with pytest.raises(UserError, match=rf"{first.tokenizer_sha256}.*{digest}"):
        open_corpus(data_of({"path": str(first.folder)}, {"path": str(second.folder)}), 4, check=True)
