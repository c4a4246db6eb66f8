"""`data inspect` says what the shards hold, and `prepare` works as a user types it."""

import json
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import zstandard
from mbit_data import inspection
from mbit_data.bench import measure
from mbit_data.inspection import inspect, render
from mbit_data.prepare import PrepareOptions, prepare

from megatron_bit.data.manifest import load_manifest
from megatron_bit.data.stream import read_documents
from megatron_bit.data.tokenizer import Tokenizer
from megatron_bit.errors import UserError


def all_documents(manifest, split):
    return [ids for shard in manifest.split(split).shards for ids in read_documents(manifest.shard_path(shard))]


def test_numbers_against_the_shards(prepared, monkeypatch):
    monkeypatch.setattr("mbit_data.inspection.MAX_SHARDS", 100)
    report = inspect(prepared.folder, samples=1000)
    documents = all_documents(prepared, "train")
    tokenizer = Tokenizer(prepared.tokenizer_path)
    assert report["read"] == {"split": "train", "shards": len(prepared.split("train").shards), "documents": 33}
    assert len(documents) == 33
    counts = Counter(bin_["from"] for bin_ in report["lengths"] for _ in range(bin_["documents"]))
    assert counts == Counter(2 ** int(math.log2(len(ids))) for ids in documents)
    tokens, texts = np.concatenate(documents), [tokenizer.decode(ids) for ids in documents]
    assert report["tokens_per_character"] == pytest.approx(len(tokens) / sum(map(len, texts)), abs=1e-4)
    share = np.bincount(tokens) / len(tokens)
    assert report["unigram_entropy_bits"] == pytest.approx(-sum(p * math.log2(p) for p in share if p), abs=1e-3)
    assert report["bits_needed"] == 9 and report["splits"]["train"]["tokens"] == len(tokens)
    assert sorted(sample["text"] for sample in report["samples"]) == sorted(text[:300] for text in texts)
    for sample in report["samples"]:
        assert "".join(token["text"] for token in sample["first_tokens"]) == sample["text"][: len("".join(
            token["text"] for token in sample["first_tokens"]))]  # fmt: skip
        assert "bits" not in sample["first_tokens"][0]
    lines = render(report).splitlines()
    assert sum(line.endswith("#") and "to" in line for line in lines) == len(report["lengths"])


@pytest.mark.parametrize("code", ["binary", "gray"])
def test_bits_are_those_of_the_code(prepared, code):
    for sample in inspect(prepared.folder, bits=12, code=code)["samples"]:
        for token in sample["first_tokens"]:
            word = token["id"] if code == "binary" else token["id"] ^ token["id"] >> 1
            assert token["bits"] == f"{word:012b}"
    assert len(inspect(prepared.folder, code=code)["samples"][0]["first_tokens"][0]["bits"]) == 9
    with pytest.raises(UserError, match="--bits 8 does not do for a vocabulary of 400: allowed are 9 to 62"):
        inspect(prepared.folder, bits=8)


def test_samples_depend_on_the_seed_alone(prepared):
    assert inspect(prepared.folder, seed=1) == inspect(prepared.folder, seed=1)
    assert inspect(prepared.folder, seed=1)["samples"] != inspect(prepared.folder, seed=2)["samples"]
    assert inspect(prepared.folder, samples=0)["samples"] == []


def test_large_folders_are_sampled_and_empty_splits_shown(corpus, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("mbit_data.inspection.MAX_SHARDS", 2)
    first, *_, last = prepared.split("train").shards
    assert inspection._spread(prepared.split("train").shards) == [first, last]
    report = inspect(prepared.folder)
    assert report["read"]["shards"] == 2 and report["read"]["documents"] < 33
    options = PrepareOptions((str(corpus),), tmp_path / "out", vocab_size=400, validation_fraction=0, workers=1)
    assert render(inspect(prepare(options, progress=False).folder, "validation")).endswith("validation split is empty")


def test_a_damaged_shard_is_named(corpus, tmp_path):
    options = PrepareOptions((str(corpus),), tmp_path / "out", vocab_size=400, workers=1)
    manifest = prepare(options, progress=False)
    path = manifest.shard_path(manifest.split("train").shards[0])
    data = bytearray(path.read_bytes())
    data[:600] = b"x" * 600
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"shard .*{path.name} is damaged"):
        inspect(manifest.folder)


def megatron_bit(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "megatron_bit", *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def test_as_a_user_types_it(tmp_path, prepared):
    lines = [json.dumps({"body": f"document {i} " + "words and words " * i}) for i in range(40)] + ["{}", lines_of("x")]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress("\n".join(lines).encode()))
    out = tmp_path / "out"
    command = ["prepare", path, "--out", out, "--tokenizer", prepared.tokenizer_path, "--text-key", "body"]
    stopped = megatron_bit(*command)
    assert stopped.returncode == 2 and stopped.stderr.splitlines()[-1] == (
        f"megatron-bit: error: input file {path}, line 41: no key 'body' (there: none; --text-key names another); "
        "fix it, or leave such records out with --on-error skip"
    )
    done = megatron_bit(
        *command, "--on-error", "skip", "--min-chars", "40", "--max-repeated-ngrams", "0.9", "--dedup", "near"
    )
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(out)
    assert manifest.dropped["damaged"] == 2 and manifest.dropped["min_chars"] == 2
    assert f"left out: {', '.join(f'{n:,} {reason}' for reason, n in manifest.dropped.items())}" in done.stdout
    shown = megatron_bit("data", "inspect", out, "--json", "--samples", "1", "--code", "gray", "--bits", "10")
    assert shown.returncode == 0, shown.stderr
    report = json.loads(shown.stdout)
    assert report["dropped"] == manifest.dropped and len(report["samples"][0]["first_tokens"][0]["bits"]) == 10
    for arguments, message in [
        (["prepare", "--out", out], "no input files"),
        (["prepare", "x", "--out", out, "--join"], "--join takes the parts"),
        (["prepare", "x", "--out", out, "--array-index", "1"], "--array-index I with --array-count N"),
        (["data", "inspect", out, "--samples", "-1"], "--samples -1 has to be at least 0"),
        (["data", "inspect", tmp_path], "has no manifest.json"),
    ]:
        wrong = megatron_bit(*arguments)
        assert wrong.returncode == 2 and message in wrong.stderr and wrong.stderr.count("\n") == 1, wrong.stderr


def lines_of(text):
    return json.dumps([text])


def test_bench_measures_prepare_against_the_tokenizer(corpus, tmp_path):
    folder = tmp_path / "bench"
    folder.mkdir()
    result = measure((str(corpus),), 1, prepared_tokenizer(corpus, tmp_path), (1,), 1, folder)
    assert result["documents"] == 40
    assert result["text_bytes"] == sum(path.stat().st_size for path in corpus.rglob("*.py"))
    assert list(result["results"]) == ["tokenizer alone", "prepare, 1 worker"]
    for row in result["results"].values():
        assert row["tokens_per_second"] == pytest.approx(result["tokens"] / row["seconds"], rel=0.05)


def prepared_tokenizer(corpus, tmp_path):
    options = PrepareOptions((str(corpus),), tmp_path / "given", vocab_size=400, workers=1)
    return prepare(options, progress=False).tokenizer_path
