"""Fixtures of the command-line tests."""

from __future__ import annotations

import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import yaml
from forked import command

sys.path.insert(0, str(Path(__file__).parent))  # for as_user, which only these tests share

from as_user import Outcome


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file of a tiny run, without data and run folder."""
    tree: dict[str, Any] = {}
    for key, value in {**tiny_runs.SETTINGS, "train.global_batch_size": 8}.items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


Arguments = Callable[..., list[str]]


@pytest.fixture(scope="session")
def train_args(base: Path, tiny_data: Path) -> Arguments:
    """train_args(run, key=value, ...) -> the words of a tiny `train` command."""

    def words(run: Path, *settings: str) -> list[str]:
        return ["train", str(base), f"run={run}", f"data.path={tiny_data}", *settings]

    return words


Forked = Callable[..., Outcome]


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Forked:
    """forked(words, ...) -> how the command ended, in a fork that has torch already: see tests/forked.py."""

    def start(words: list[str], **how: Any) -> Outcome:
        ended = command(words, tmp_path_factory.mktemp("forked"), **{"timeout": 20, **how})
        return Outcome(ended.code, ended.out, ended.err)

    return start


@dataclass(frozen=True)
class Damaged:
    """A copy of the data in which all shards but the first of the order cannot be read."""

    folder: Path
    seed: int  # train.seed for which the order begins with the smallest shard
    whole: int  # samples before the first damaged one


@pytest.fixture(scope="session")
def damaged(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    from megatron_bit.data.manifest import load_manifest
    from megatron_bit.data.order import SampleOrder

    folder = tmp_path_factory.mktemp("damaged") / "data"
    shutil.copytree(tiny_data, folder)
    manifest = load_manifest(folder)
    shards = manifest.split("train").shards
    first = min(range(len(shards)), key=lambda index: shards[index].tokens)
    length = tiny_runs.SETTINGS["data.seq_length"]
    seed = next(
        seed
        for seed in range(1000)
        if SampleOrder([s.tokens for s in shards], seq_length=length, seed=seed, shuffle_shards=1).locate(0)[1] == first
    )
    for index, shard in enumerate(shards):
        if index != first:
            path = manifest.shard_path(shard)
            with tarfile.open(path) as tar:
                at = next(m.offset_data for m in tar if m.name.endswith("tokens.npy"))
            content = bytearray(path.read_bytes())
            content[at : at + 16] = bytes(16)  # the payload's own header; the tar is as long as before
            path.write_bytes(content)
    return Damaged(folder, seed, shards[first].tokens // length)
