"""Fixtures of the command-line tests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import yaml

sys.path.insert(0, str(Path(__file__).parent))  # for as_user, which only these tests share

from as_user import Outcome, environment


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file of a tiny run, without data and run folder."""
    tree: dict[str, Any] = {}
    for key, value in tiny_runs.SETTINGS.items():
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


Zygote = Callable[[list[dict[str, Any]]], list[Outcome]]


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Zygote:
    """Run cases of zygote.py; an outcome joins what all ranks wrote, and its code is the first that is not 0."""

    def start(cases: list[dict[str, Any]]) -> list[Outcome]:
        folder = tmp_path_factory.mktemp("zygote")
        (folder / "cases.json").write_text(json.dumps(cases))
        script = Path(__file__).parent / "zygote.py"
        done = subprocess.run(
            [sys.executable, "-P", str(script), str(folder / "cases.json"), str(folder)],
            env=environment(DS_ACCELERATOR="cpu", TORCH_CPP_LOG_LEVEL="ERROR"),  # as `train` does
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        codes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
        return [
            Outcome(
                next((code for code in ranks if code), 0),
                "".join((folder / f"{case}-{rank}.out").read_text() for rank in range(len(ranks))),
                "".join((folder / f"{case}-{rank}.err").read_text() for rank in range(len(ranks))),
            )
            for case, ranks in enumerate(codes)
        ]

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
