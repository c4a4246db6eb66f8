"""Learned codes: the search, what codes cost, the file, the command."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mbit_data import bigrams as module
from mbit_data.anneal import PRIOR, _Search, anneal
from mbit_data.bigrams import DISCOUNT, Bigrams, BitCost, count_bigrams, group_sizes
from mbit_data.codes import CodeOptions, compare, learn, render

from megatron_bit.commands.codes import codes
from megatron_bit.commands.data import prepare
from megatron_bit.data.codes import load_code, read_code, table_of, write_code
from megatron_bit.data.fit import code_path
from megatron_bit.data.manifest import Manifest, load_manifest
from megatron_bit.errors import UserError
from megatron_bit.model.codec import Codec, learned_table

FAST = CodeOptions(sweeps=60)


@pytest.fixture
def folder(tiny_data: Path, tmp_path: Path) -> Path:
    """Real text, 421 tokens, in a folder of its own."""
    return Path(shutil.copytree(tiny_data, tmp_path / "own"))


def _pairs(ids: np.ndarray, size: int) -> Bigrams:
    keys, count = np.unique(ids[:-1] * size + ids[1:], return_counts=True)
    return Bigrams(size, keys // size, keys % size, count, len(ids))


def _text(size: int, length: int, seed: int) -> np.ndarray:
    """Tokens of two hidden classes that follow each other: nearly always the class changes."""
    random = np.random.default_rng(seed)
    kind = (np.arange(length) + np.cumsum(random.random(length) < 0.05)) % 2
    members = np.random.default_rng(9).permutation(size).reshape(2, -1)  # classes say nothing about the ids
    return members[kind, random.integers(0, size // 2, length)]


def test_the_first_bit_separates_classes() -> None:
    size = 64  # as many as there are codes: with spare ones an uneven bit may be worth more
    words = anneal(_pairs(_text(size, 30_000, 1), size), 6, 200, 0, lambda: None)
    members = np.random.default_rng(9).permutation(size).reshape(2, -1)
    table = table_of(words, 6)
    assert set(table[members[0], 0]) != set(table[members[1], 0])
    assert len(set(table[members[0], 0])) == len(set(table[members[1], 0])) == 1


@pytest.mark.parametrize(("size", "bits"), [(2, 1), (33, 6), (64, 6), (33, 8)])
def test_codes_are_distinct_and_repeat(size: int, bits: int) -> None:
    pairs = _pairs(np.random.default_rng(2).integers(0, size, 3000) * 7 % size, size)
    calls: list[int] = []
    first = anneal(pairs, bits, 30, 5, lambda: calls.append(1))
    assert len(calls) == 30
    assert len(np.unique(first)) == size and first.min() >= 0 and first.max() < 1 << bits
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    assert np.array_equal(first, anneal(pairs, bits, 30, 5, lambda: None))
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)


def _entropy(pairs: Bigrams, words: np.ndarray, bits: int) -> float:
    """F of anneal.py, pair by pair."""
    size = pairs.vocab_size
    unigram = (np.bincount(pairs.following, weights=pairs.count, minlength=size) + 0.5).astype(float)
    n = np.zeros((size, size))
    n[pairs.previous, pairs.following] = pairs.count
    n += PRIOR * unigram / unigram.sum()
    total = 0.0
    for j in range(bits):
        for bit in (0, 1):
            mass = n[:, (words >> j) & 1 == bit].sum(1)
            total -= float((mass * np.log(np.maximum(mass, 1e-300) / n.sum(1))).sum())
    return total


def test_gains_are_those_of_flipping_a_bit() -> None:
    size, bits = 20, 6
    pairs = _pairs(_text(size, 50_000, 3), size)
    words = np.random.default_rng(0).permutation(1 << bits)[:size]
    gains, cost = _Search(pairs, bits).flips(words)
    assert cost == pytest.approx(_entropy(pairs, words, bits), rel=1e-5)
    for token, bit in ((0, 0), (3, 5), (11, 2), (19, 4)):
        flipped = words.copy()
        flipped[token] ^= 1 << bit
        exact = _entropy(pairs, words, bits) - _entropy(pairs, flipped, bits)
        assert gains[token, bit] == pytest.approx(exact, rel=0.02, abs=1e-4 * cost)


def test_cost_against_brute_force() -> None:
    size, bits = 11, 5
    random = np.random.default_rng(4)
    train = _pairs(random.choice(size, 400, p=(p := np.arange(1, size + 1) / 66)), size)
    held = _pairs(random.choice(size, 300, p=p), size)
    table = Codec("random", size, bits).table.numpy()
    unigram = np.full(size, 0.5)
    n = np.zeros((size, size))
    for u, v, c in zip(train.previous, train.following, train.count, strict=True):
        n[u, v] += c
        unigram[v] += c
    unigram /= unigram.sum()
    cost = BitCost(train, held)
    for group in (1, 2, 3, 5):
        token = apart = 0.0
        for u, v, c in zip(held.previous, held.following, held.count, strict=True):
            total = n[u].sum()
            q = [
                (max(n[u, w] - DISCOUNT, 0) + DISCOUNT * (n[u] > 0).sum() * unigram[w]) / total if total else unigram[w]
                for w in range(size)
            ]
            token -= c * np.log(q[v])
            first = 0
            for width in group_sizes(bits, group):
                part = slice(first, first + width)
                apart -= c * np.log(sum(q[w] for w in range(size) if (table[w, part] == table[v, part]).all()))
                first += width
        assert cost.token == pytest.approx(token / held.total)
        assert cost.apart(table, group) == pytest.approx((apart - token) / held.total, abs=1e-9)
    assert cost.apart(table, bits) == pytest.approx(0, abs=1e-9)
    assert [group_sizes(12, 8), group_sizes(15, 8), group_sizes(10, 4)] == [(6, 6), (8, 7), (4, 3, 3)]


def test_counting_many_shards_and_too_many_pairs(
    make_data: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_bit.data.stream import read_shard

    manifest = make_data([3000, 2000, 2500, 1000])
    pairs = count_bigrams(manifest, "train", 10**9)
    expected: dict[tuple[int, int], int] = {}
    for shard in manifest.split("train").shards:
        ids = read_shard(manifest, shard).tolist()
        for pair in itertools.pairwise(ids):
            expected[pair] = expected.get(pair, 0) + 1
    found = zip(pairs.previous.tolist(), pairs.following.tolist(), pairs.count.tolist(), strict=True)
    assert {(u, v): c for u, v, c in found} == expected and pairs.total == 8496
    assert count_bigrams(manifest, "train", 4000).tokens == 3000  # one of four shards
    monkeypatch.setattr(module, "MAX_PAIRS", 100)
    few = count_bigrams(manifest, "train", 10**9)
    assert len(few.count) == 100 and few.dropped > 0


def test_better_than_the_others_on_real_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert codes(folder, sweeps=100, quiet=True) == 0
    assert "model.code=semantic model.bits=9" in capsys.readouterr().out
    assert codes(folder, compare=True, quiet=True, json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bits"] == 9 and list(report["codes"]) == ["binary", "gray", "random", "semantic"]
    for group, share in (("1", 0.7), ("5", 0.8)):
        found = {name: row[group] for name, row in report["codes"].items()}
        assert 0 < found["semantic"] < share * min(found["binary"], found["gray"], found["random"]), found
    assert "semantic" in render(report)
    wide = compare(folder, CodeOptions(bits=11), (code_path(folder, 9),), progress=False)
    assert not wide["learned"] and "no learned code here" in render(wide)
    assert list(wide["codes"])[-1] == str(code_path(folder, 9))


def test_same_options_same_bytes_and_no_silent_change(folder: Path) -> None:
    done = learn(folder, FAST, progress=False)
    path = code_path(folder, 9)
    first = path.read_bytes()
    assert done["made"] and done["path"] == str(path)
    assert not learn(folder, FAST, progress=False)["made"]
    other = dataclasses.replace(FAST, seed=1)
    with pytest.raises(UserError, match=r"is another code: seed \(0 there, 1 here\).*--force"):
        learn(folder, other, progress=False)
    learn(folder, other, out=folder / "x" / "one.safetensors", progress=False)
    learn(folder, other, force=True, progress=False)
    assert path.read_bytes() == (folder / "x" / "one.safetensors").read_bytes() != first
    learn(folder, FAST, force=True, progress=False)
    assert path.read_bytes() == first
    manifest = load_manifest(folder)
    table = load_code(manifest, 9).table
    assert table.shape == (421, 9) and len(np.unique(table, axis=0)) == 421
    codec = Codec("semantic", 421, 9, learned_table("semantic", manifest, 9))
    ids = torch.arange(421)
    assert torch.equal(codec.decode(codec.encode(ids).float()), ids)


def test_errors_of_files(folder: Path) -> None:
    manifest = load_manifest(folder)
    path = code_path(folder, 9)
    with pytest.raises(UserError, match=r"semantic-9.safetensors, which is not there; .*`megatron-bit codes"):
        load_code(manifest, 9)
    with pytest.raises(UserError, match=r"model.bits 8 is too small.*model.bits=9"):
        learned_table("semantic", manifest, 8)
    learn(folder, FAST, progress=False)
    whole = path.read_bytes()
    code = load_code(manifest, 9)
    for damaged in (whole[:-1], whole[:100], b"", whole[:-1] + bytes([whole[-1] ^ 0xFE])):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged|cannot be read as a code"):
            load_code(manifest, 9)
    write_code(path, dataclasses.replace(code, tokenizer_sha256="0" * 64))
    with pytest.raises(UserError, match="of another tokenizer"):
        load_code(manifest, 9)
    for table in (code.table[:-1], code.table[:, :-1]):
        twice = np.unique(table, axis=0)
        write_code(path, dataclasses.replace(code, table=twice))
        with pytest.raises(UserError, match="wanted are 421 tokens x 9"):
            load_code(manifest, 9)
    with pytest.raises(UserError, match="421 tokens share 420 codes"):
        write_code(path, dataclasses.replace(code, table=np.concatenate((code.table[:1], code.table[:-1]))))
    path.write_bytes(whole)
    with pytest.raises(UserError, match="wanted are 421 tokens x 10"):
        read_code(path, manifest, 10)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"bits": 8}, "--bits 8 .* 421: allowed are 9 to 24"),
        ({"bits": 60}, "--bits 60 .* 421: allowed are 9 to 24"),
        ({"sweeps": 0}, "--sweeps 0"),
        ({"seed": -1}, "--seed -1"),
        ({"tokens": 0}, "--tokens 0"),
        ({"files": ("a",)}, "--compare"),
        ({"compare": True, "force": True}, "--force"),
        ({"compare": True, "files": ("none.safetensors",)}, "none.safetensors cannot be read"),
    ],
)
def test_errors_of_options(tiny_data: Path, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        codes(tiny_data, quiet=True, **arguments)
    assert not (tiny_data / "codes").exists()


def test_prepare_learns_the_code_too(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbit_data.codes.default_sweeps", lambda vocab_size: 20)
    out = tmp_path / "out"

    def run() -> None:
        assert prepare((str(corpus),), out=out, vocab_size=400, workers=1, codes="semantic", quiet=True) == 0

    run()
    manifest, code = ((out / name).read_bytes() for name in ("manifest.json", "codes/semantic-9.safetensors"))
    run()
    shutil.rmtree(out / "codes")  # killed before the code was there
    run()
    assert (out / "codes/semantic-9.safetensors").read_bytes() == code
    assert (out / "manifest.json").read_bytes() == manifest
    with pytest.raises(UserError, match="--codes is for the whole folder"):
        prepare((str(corpus),), out=tmp_path / "part", array_index=0, array_count=2, codes="semantic", quiet=True)
