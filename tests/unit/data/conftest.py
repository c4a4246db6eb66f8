"""Small corpora and data folders."""

import hashlib
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mbit_data.prepare import PrepareOptions, prepare
from mbit_data.tokenize import TokenizedDocument
from mbit_data.write import SplitWriter

from megatron_bit.data.manifest import FILE_NAME, Manifest, Split
from megatron_bit.io.files import write_atomic

VOCAB_SIZE = 1000
MakeData = Callable[..., Manifest]


def write_corpus(folder: Path, files: int = 40, seed: int = 0) -> Path:
    """Text files that look a little like source code, in two nested folders."""
    random_source = random.Random(seed)
    words = ["".join(random_source.choices("abcdefghij_", k=random_source.randint(2, 9))) for _ in range(300)]
    for number in range(files):
        lines = []
        for _ in range(random_source.randint(5, 60)):
            indent = random_source.choice(["", "    ", "        ", "\t"])
            lines.append(indent + " ".join(random_source.choices(words, k=random_source.randint(0, 9))))
        path = folder / ("inner" if number % 3 == 0 else ".") / f"file{number:03d}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + f"\n# {number} é😀▁\r\n", newline="")
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """A finished folder of several shards, made once; do not write into it."""
    folder = tmp_path_factory.mktemp("prepared")
    options = PrepareOptions(
        inputs=(str(write_corpus(folder / "corpus")),),
        out=folder / "out",
        vocab_size=400,
        validation_fraction=0.2,
        shard_tokens=4000,
        workers=1,
    )
    return prepare(options, progress=False)


@pytest.fixture
def make_data(tmp_path: Path) -> MakeData:
    """make_data([tokens of shard 0, ...]) -> Manifest of a `train` split with random tokens, without text."""

    def make(shard_tokens: list[int], name: str = "data", dtype: str = "uint16") -> Manifest:
        folder = tmp_path / name
        folder.mkdir()
        values = np.random.default_rng(len(shard_tokens))
        shards = []
        for number, count in enumerate(shard_tokens):
            writer = SplitWriter(folder, f"s{number}", shard_tokens=10**9)
            cuts = sorted({0, count, count // 3, count // 2})
            for i, (begin, end) in enumerate(itertools.pairwise(cuts)):
                tokens = values.integers(0, VOCAB_SIZE, end - begin).astype(dtype)
                writer.add(f"{i:03d}", TokenizedDocument("x.txt", i, tokens, len(tokens), b"", 0))
            shards += writer.finish().shards
        write_atomic(folder / "tokenizer.model", b"none")
        manifest = Manifest(
            folder=folder,
            splits={"train": Split(tuple(shards))},
            tokenizer_file="tokenizer.model",
            tokenizer_sha256=hashlib.sha256(b"none").hexdigest(),
            vocab_size=VOCAB_SIZE,
            eos_id=0,
            dtype=dtype,
            identity={},
            package_version="0",
        )
        write_atomic(folder / FILE_NAME, manifest.to_json().encode())
        return manifest

    return make
