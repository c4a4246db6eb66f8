"""Bits a byte are of the text that was scored: a split whose beginning is unlike the rest, and all kinds of models."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tiny_runs
import tokenizers
import torch
from gloo_ranks import run_ranks
from mbit_data.prepare import PrepareOptions, prepare
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_bit.data.manifest import load_manifest
from megatron_bit.data.stream import read_shard
from megatron_bit.errors import UserError
from megatron_bit.evaluation.loading import open_model
from megatron_bit.evaluation.report import Request, evaluate
from megatron_bit.evaluation.validation import Validation
from megatron_bit.inference.convert import to_hf
from megatron_bit.inference.generate import Generator

SAMPLES = 11
REQUEST = Request(
    likelihood=True, samples=SAMPLES, tolerance=None, max_passes=None, noise_samples=None, texts=0, tokens=12, prefix=0,
    how={}, scorer=None, mauve_model=None, tasks=(), tasks_data=None, limit=None, weights="trained", data=None,
    seed=0, batch_size=4,
)  # fmt: skip
LONG = ("internationalization", "r\u00e9sponsabilit\u00e9s", "\u4e2d\u6587\u65e5\u672c\u8a9e", "electromagnetic")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, draw = tmp_path_factory.mktemp("bytes"), random.Random(0)
    short = [" ".join(draw.choices("0123456789", k=100)) for _ in range(150)]
    long = [" ".join(draw.choices(LONG, k=40)) for _ in range(150)]
    (root / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in short + long))
    options: dict[str, Any] = {"inputs": (str(root / "in.jsonl"),), "validation_fraction": 0.2, "workers": 1}
    prepare(PrepareOptions(out=root / "data", vocab_size=330, **options), progress=False)
    for name, settings in {
        "chain": {"model.head.kind": "chain", "model.group_bits": 3},
        "softmax": {"model.head.kind": "softmax", "model.block_size": 1},
    }.items():
        settings |= {"train.steps": 1, "model.num_layers": 1, "evaluate.every": 0}
        assert run_ranks(tiny_runs.train, 1, tiny_runs.overrides(root / name, root / "data", settings)) == [0]
        to_hf(root / name, root / f"{name}-hf")
    letters = tokenizers.ByteLevelBPETokenizer(lowercase=False)
    letters.train_from_iterator(LONG, vocab_size=290, special_tokens=["</s>"])
    _foreign(root / "foreign", letters._tokenizer)
    few = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "[UNK]": 1, LONG[0]: 2, "7": 3}, "[UNK]"))
    few.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    _foreign(root / "unknown", few)
    return root


def _foreign(folder: Path, tokenizer: Any) -> None:
    """A Llama with a tokenizer of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


def documents(root: Path) -> list[str]:
    """Of the validation split in the order of its shards, by SentencePiece alone."""
    manifest = load_manifest(root / "data")
    ids = np.concatenate([read_shard(manifest, shard) for shard in manifest.split("validation").shards]).astype(int)
    pieces = np.split(ids, np.flatnonzero(ids == manifest.eos_id) + 1)
    model = sentencepiece.SentencePieceProcessor(model_file=str(manifest.tokenizer_path))
    return [model.decode([i for i in piece.tolist() if i != manifest.eos_id]) for piece in pieces if len(piece)]


def check(found: Any, size: int) -> None:
    assert found.bytes == size
    assert found.bits_per_byte == pytest.approx(found.nats_per_token * found.tokens / math.log(2) / size, rel=1e-12)


@pytest.mark.parametrize("name", ["chain", "softmax", "chain-hf", "softmax-hf"])
def test_of_our_tokenizer(name: str, root: Path) -> None:
    data = str(root / "data") if name.endswith("hf") else None
    found = evaluate(root / name, Request(**{**vars(REQUEST), "data": data})).likelihood
    assert found is not None and found.samples == SAMPLES
    manifest = load_manifest(root / "data")
    ids = np.concatenate([read_shard(manifest, shard) for shard in manifest.split("validation").shards])[: found.tokens]
    model = sentencepiece.SentencePieceProcessor(model_file=str(manifest.tokenizer_path))
    text = model.decode([int(i) for i in ids if i != manifest.eos_id])
    check(found, len(text.rstrip("\ufffd").encode()))
    split = manifest.split("validation")
    assert abs(found.bytes / found.tokens / (split.text_bytes / split.tokens) - 1) > 0.2, "it is like the rest"


def test_of_another_tokenizer(root: Path) -> None:
    """By the places of its tokens in the text, which that library tells."""
    found = evaluate(root / "foreign", Request(**{**vars(REQUEST), "data": str(root / "data")})).likelihood
    theirs: Any = PreTrainedTokenizerFast.from_pretrained(root / "foreign")
    left, size = found.tokens, 0  # type: ignore[union-attr]
    for text in documents(root):
        places = theirs(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        some = places[:left]
        open_end = len(some) < len(places) and some and places[len(some)][0] < some[-1][1]  # inside a character
        size += len(text[: some[-1][1] - bool(open_end)].encode()) if some else 0
        left -= len(some) + 1  # and the end of the document
        if left <= 0:
            break
    check(found, size)


def test_the_samples_of_a_document_have_its_bytes(root: Path) -> None:
    """However many samples it is cut into, and where the model's tokens do not give the text back."""
    texts = documents(root)
    for name in ("chain", "foreign", "unknown"):
        model = open_model(root / name)
        validation = Validation(model, root / "data")
        total = sum(len(model.encode(text)) + 1 for text in texts)
        begins, steps = (2, total // 2, max(2, total - 500)), []  # closely at both ends and in the middle
        strides = {*range(2, total, max(7, total // 40))}
        closely = {count for begin in begins for count in range(begin, min(total, begin + 700), 7)}
        before, last = 0, 0
        for count in sorted(strides | closely):
            validation.samples(2, count // 2)
            assert before <= validation.bytes <= sum(len(text.encode()) for text in texts)
            if count - last <= 7:
                steps.append(validation.bytes - before)
            before, last = validation.bytes, count
        validation.samples(total, 1)
        assert validation.bytes == sum(len(text.encode()) for text in texts)
        assert validation.bytes_per_token == validation.bytes / total
        assert max(steps) < 1000


def test_texts_behind_a_prefix_are_scored_as_they_are(root: Path) -> None:
    request = {**vars(REQUEST), "likelihood": False, "texts": 3, "prefix": 5, "scorer": root / "foreign"}
    made = evaluate(root / "chain", Request(**request)).samples
    assert made is not None
    piece = Validation(open_model(root / "chain"), root / "data").spread_in_documents(3, 17)
    manifest = load_manifest(root / "data")
    model = sentencepiece.SentencePieceProcessor(model_file=str(manifest.tokenizer_path))
    sizes = [len(model.decode(ids).encode()) - len(model.decode(ids[:5]).encode()) for ids in piece]
    assert abs(made.real.bytes - sum(sizes)) <= 3 * 3  # a prefix may end inside a character
    total = made.real.nats_per_token * made.real.tokens
    assert made.real.nats_per_byte == pytest.approx(total / made.real.bytes)


def test_another_tokenizer_in_the_data_folder_is_refused(root: Path, tmp_path: Path) -> None:
    """One of the same size: whatever opens a run's tokenizer says so, in one line."""
    data = tmp_path / "data"
    shutil.copytree(root / "data", data)
    content = bytearray((data / "tokenizer.model").read_bytes())
    at = content.index(b"international"[:5])
    content[at : at + 1] = b"o"
    (data / "tokenizer.model").write_bytes(content)
    said = r"tokenizer.model is not the one the manifest names"
    for run in (root / "chain", root / "softmax"):
        with pytest.raises(UserError, match=said):
            to_hf(run, tmp_path / "out", data=str(data))
    with pytest.raises(UserError, match=said):
        Generator(root / "chain", str(data))
    for name in ("chain", "softmax-hf", "foreign"):
        with pytest.raises(UserError, match=said):
            evaluate(root / name, Request(**{**vars(REQUEST), "data": str(data)}))
    config = root / "softmax-hf" / "config.json"
    shutil.copytree(root / "softmax-hf", tmp_path / "folder")
    assert "tokenizer_fingerprint" in config.read_text()
    path = tmp_path / "folder" / "tokenizer.json"
    path.write_text(path.read_text().replace("elec", "olec"))
    with pytest.raises(UserError, match=r"is not the tokenizer that .* was converted with"):
        open_model(tmp_path / "folder")
