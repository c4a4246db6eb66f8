"""Which documents are left out: filters by definition, duplicates against brute force, the same in every order."""

import itertools
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mbit_data import minhash
from mbit_data.dedup import choose, write_keys
from mbit_data.filters import Filters, alpha_fraction, duplicate_lines, repeated_ngrams, symbol_ratio
from mbit_data.minhash import BANDS, ROWS, near_keys, signature
from mbit_data.options import PrepareOptions
from mbit_data.prepare import prepare
from mbit_data.tokenize import keys

from megatron_bit.data.stream import read_documents
from megatron_bit.data.tokenizer import Tokenizer
from megatron_bit.errors import UserError

WORDS = [f"w{i}" for i in range(5000)]


def article(generator, words=300):
    return " ".join(generator.choices(WORDS, k=words)) + "\n"


def edited(generator, text, changes):
    words = text.split()
    for place in generator.sample(range(len(words)), changes):
        words[place] = "changed"
    return " ".join(words)


def copies_of(tmp_path, texts, dedup, parts=1, filters=Filters()):
    paths = []
    for part in range(parts):
        share = texts[part * len(texts) // parts : (part + 1) * len(texts) // parts]
        paths.append(tmp_path / f"{part}.keys")
        write_keys(paths[-1], keys(list(enumerate(share)), (filters, dedup)))
    return choose(paths, dedup)


def test_filters_by_definition():
    assert alpha_fraction(["one", "2", "three4", "---", "пять", "漢字"]) == pytest.approx(4 / 6)
    assert symbol_ratio("# a ... b… c", ["#", "a", "...", "b…", "c"]) == pytest.approx(3 / 5)
    assert duplicate_lines("a\n b\n\na \nb\nc\n") == pytest.approx(2 / 5)
    # the second "a b c d e" is 5 of 11 characters, whichever words are around it
    assert repeated_ngrams(["a", "b", "c", "d", "e", "x", "a", "b", "c", "d", "e"]) == pytest.approx(5 / 11)
    assert repeated_ngrams(["a"] * 10) == pytest.approx(9 / 10)
    assert repeated_ngrams(["a", "b", "c", "d"]) == repeated_ngrams([]) == 0.0


@pytest.mark.parametrize(
    "limit, kept, dropped",
    [
        ({"min_chars": 3}, "abc", "ab"),
        ({"max_chars": 3}, "äbc", "abcd"),
        ({"min_alpha_fraction": 0.5}, "a 1", "a 1 2"),
        ({"max_symbol_ratio": 0.5}, "# a", "## a"),
        ({"max_duplicate_lines": 0.5}, "a\na", "a\na\na"),
        ({"max_repeated_ngrams": 0.4}, "a b c d e f", "a b c d e a b c d e"),
    ],
)
def test_each_limit_holds_to_its_border(limit, kept, dropped):
    assert Filters(**limit).reason(kept) is None
    assert Filters(**limit).reason(dropped) == next(iter(limit))
    assert Filters().reason(kept) is Filters().reason(dropped) is None


@given(st.lists(st.sampled_from("abc"), max_size=25))
@settings(max_examples=200, deadline=None)
def test_repeated_ngrams_against_the_plain_definition(words):
    grams = [tuple(words[i : i + 5]) for i in range(len(words) - 4)]
    inside = {i + k for i, gram in enumerate(grams) if gram in grams[:i] for k in range(5)}
    assert repeated_ngrams(words) == pytest.approx(len(inside) / max(1, len(words)))


def test_the_signature_estimates_the_jaccard_similarity():
    generator = random.Random(1)
    for changes in (0, 3, 10, 30, 100):
        text = article(generator, 1500)
        other = edited(generator, text, changes)
        sets = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (text.split(), other.split())]
        jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        estimate = float((signature(text) == signature(other)).mean())
        assert estimate == pytest.approx(jaccard, abs=4 * (jaccard * (1 - jaccard) / 112) ** 0.5 + 1e-9)


def test_signatures_do_not_depend_on_this_process(tmp_path):
    """They are compared across machines and runs, so they are written down here."""
    assert signature("A quick brown fox jumps.")[:2].tolist() == [17573825822997378936, 16245898413255368529]
    assert near_keys("A quick brown fox jumps.")[:2].tolist() == [4353618952868048363, 12025717888363597122]
    assert near_keys("").shape == (BANDS,) and signature("").shape == (BANDS * ROWS,)


def test_near_ignores_case_and_punctuation_and_knows_scripts_without_spaces():
    assert np.array_equal(near_keys("Hello, World!"), near_keys("hello world"))
    assert not np.array_equal(near_keys("hello world"), near_keys("world hello"))
    assert minhash.WORD.findall("漢字kana ไทย") == ["漢", "字", "kana", "ไ", "ท", "ย"]
    assert not np.array_equal(near_keys("!!!"), near_keys("???"))


def test_exact_finds_what_differs_in_white_space_only(tmp_path):
    texts = ["a b", "x", "a  b\n", "A b", "e\u0301", "\u00e9", "x"]
    copies = copies_of(tmp_path, texts, "exact")
    assert copies[6] and not copies[1] and not copies[3]
    assert copies[[0, 2]].sum() == 1 and copies[[4, 5]].sum() == 1 and copies.sum() == 3


@pytest.mark.parametrize("dedup", ["exact", "near"])
def test_the_same_texts_stay_in_every_order_and_every_division(tmp_path, dedup):
    generator = random.Random(2)
    texts = [article(generator) for _ in range(60)]
    for text in texts[:20]:
        texts += [edited(generator, text, generator.choice([0, 1, 2])) for _ in range(generator.randint(1, 4))]
    kept = None
    for attempt in range(4):
        generator.shuffle(texts)
        copies = copies_of(tmp_path, texts, dedup, parts=attempt + 1)
        now = sorted(text for text, copy in zip(texts, copies, strict=True) if not copy)
        assert kept is None or now == kept
        kept = now
    if dedup == "near":
        assert len(kept) == 60  # one of each family: two or fewer of 300 words changed is 0.97 alike


def test_near_components_against_brute_force(tmp_path):
    """Chains too: A like B, B like C, so one of the three stays."""
    generator = random.Random(3)
    texts = [article(generator, 120)]
    for _ in range(150):
        texts.append(edited(generator, generator.choice(texts), 2) if generator.random() < 0.7 else article(generator))
    bands = [near_keys(text) for text in texts]
    component = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            if (bands[i] == bands[j]).any():
                component = [component[j] if c == component[i] else c for c in component]
    copies = copies_of(tmp_path, texts, "near", parts=3)
    for name in set(component):
        members = [i for i, c in enumerate(component) if c == name]
        ranks = keys([(i, texts[i]) for i in members], (Filters(), "exact"))
        best = min(members, key=lambda i: tuple(ranks[members.index(i)][:2]))
        assert [i for i in members if not copies[i]] == [best]
    assert len(set(component)) < 100 and not copies.all()


@given(st.lists(st.lists(st.integers(1, 6), min_size=BANDS, max_size=BANDS), max_size=25), st.randoms())
@settings(max_examples=150, deadline=None)
def test_components_of_any_keys(tmp_path_factory, bands, generator):
    """Long chains through many bands, which take several rounds; ranks in random order."""
    bands = [[key if key < 3 else 100 * i + key for key in row] for i, row in enumerate(bands)]  # few links
    ranks = generator.sample(range(1, 1000), len(bands))
    path = tmp_path_factory.getbasetemp() / "any.keys"
    write_keys(path, (np.array([rank, 0, *row], dtype=np.uint64) for rank, row in zip(ranks, bands, strict=True)))
    component = list(range(len(bands)))
    for i, j in itertools.combinations(range(len(bands)), 2):
        if any(a == b for a, b in zip(bands[i], bands[j], strict=True)):
            component = [component[j] if c == component[i] else c for c in component]
    best = {name: min(r for r, c in zip(ranks, component, strict=True) if c == name) for name in component}
    expected = [rank != best[name] for rank, name in zip(ranks, component, strict=True)]
    assert choose([path], "near").tolist() == expected


def test_a_chain_that_runs_against_the_bands(tmp_path):
    """Document i shares band 13 - i with the next one: the smallest rank goes one step a round."""
    keys_ = np.arange(1, 16 * 15 + 1, dtype=np.uint64).reshape(15, 16)
    keys_[:, 0] = np.arange(1, 16)
    for i in range(14):
        keys_[i + 1, 2 + 13 - i] = keys_[i, 2 + 13 - i]
    write_keys(tmp_path / "chain.keys", iter(keys_))
    rounds = []
    assert choose([tmp_path / "chain.keys"], "near", rounds.append).tolist() == [False] + [True] * 14
    assert len(rounds) > 10


def test_a_filtered_document_is_nobodys_original(tmp_path):
    texts = ["abc", "abc  "]
    copies = copies_of(tmp_path, texts, "exact", filters=Filters(max_chars=3))
    assert copies.tolist() == [False, False]  # the second one is for the filter to count
    with pytest.raises(UserError, match="damaged"):
        (tmp_path / "cut.keys").write_bytes(b"12345")
        choose([tmp_path / "cut.keys"], "near")
    (tmp_path / "none.keys").write_bytes(b"")
    assert choose([tmp_path / "none.keys"], "near").tolist() == []


def test_prepare_leaves_out_and_counts(tmp_path, prepared):
    generator = random.Random(4)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    originals = [article(generator) for _ in range(12)]
    texts = [*originals, *(edited(generator, text, 1) for text in originals[:5]), originals[7], "short", "# # # # a b"]
    for i, text in enumerate(texts):
        (corpus / f"{i:02d}.txt").write_text(text)
    common = {
        "inputs": (str(corpus),), "tokenizer": prepared.tokenizer_path, "validation_fraction": 0.3, "shard_tokens": 900,
        "filters": Filters(min_chars=6, max_symbol_ratio=0.5), "dedup": "near",
    }  # fmt: skip
    one = prepare(PrepareOptions(out=tmp_path / "one", workers=1, **common), progress=False)
    assert one.dropped == {"max_symbol_ratio": 1, "min_chars": 1, "near duplicate": 6}
    assert sum(split.documents for split in one.splits.values()) == 12
    two = prepare(PrepareOptions(out=tmp_path / "two", workers=2, **common), progress=False)
    names = {path.name for path in one.folder.iterdir()}
    assert names == {path.name for path in two.folder.iterdir()} and not [n for n in names if "keys" in n]
    assert all((one.folder / name).read_bytes() == (two.folder / name).read_bytes() for name in names)
    assert one.identity["filters"] == {"min_chars": 6, "max_symbol_ratio": 0.5} and one.identity["dedup"] == "near"
    tokenizer = Tokenizer(one.tokenizer_path)
    for split in one.splits.values():
        for shard in split.shards:
            assert all(re.match(r"w\d", tokenizer.decode(ids)) for ids in read_documents(one.shard_path(shard)))
    with pytest.raises(UserError, match="holds other data: dedup"):
        prepare(PrepareOptions(out=tmp_path / "one", workers=1, **{**common, "dedup": None}), progress=False)
    with pytest.raises(UserError, match=r"input is empty.*20 min_chars"):
        every = {**common, "filters": Filters(min_chars=10**6), "dedup": None}
        prepare(PrepareOptions(out=tmp_path / "none", workers=1, **every), progress=False)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"filters": Filters(min_chars=0)}, "min_chars is 0"),
        ({"filters": Filters(min_chars=5, max_chars=4)}, "min_chars is 5, above max_chars 4"),
        ({"filters": Filters(max_symbol_ratio=1.5)}, "max_symbol_ratio is 1.5"),
        ({"dedup": "fuzzy"}, "dedup is 'fuzzy'; allowed are exact, near"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; allowed are stop, skip"),
        ({"eos_token": "x"}, "eos_token is 'x'; it is for a tokenizer.json"),
    ],
)
def test_wrong_limits_are_user_errors(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        prepare(PrepareOptions(("stdlib",), tmp_path / "out", **wrong), progress=False)
    assert not (tmp_path / "out").exists()
