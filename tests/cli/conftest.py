"""Runs the product as its user does: the installed command in processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import yaml

BIN = Path(sys.executable).parent
COMMAND = str(BIN / "megatron-bit")
TORCHRUN = (str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "megatron_bit")
_FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int | str
    out: str
    err: str

    def refused(self, *parts: str) -> str:
        """Assert that this is a user's mistake, said once and in one line that has all `parts`; returns the line."""
        assert self.code == 2, f"exit code {self.code}\n{self.err}"
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("megatron-bit: error")]
        assert len(lines) == 1, self.err
        for part in parts:
            assert part in lines[0], f"{part!r} is not in: {lines[0]}"
        return lines[0]

    def refused_alone(self, *parts: str) -> str:
        """The same, and nothing else is on stderr."""
        line = self.refused(*parts)
        assert self.err == f"{line}\n"
        return line


def environment(**extra: str) -> dict[str, str]:
    base = {key: value for key, value in os.environ.items() if key not in _FOREIGN}
    return {**base, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TERM": "dumb", "COLUMNS": "200", **extra}


def run(*args: str, command: Sequence[str] = (COMMAND,), timeout: float = 90, **env: str) -> Outcome:
    """Run the command to its end."""
    done = subprocess.run(
        [*command, *args], env=environment(**env), capture_output=True, text=True, timeout=timeout, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


class Running:
    """A command under way, whose progress lines a test waits for."""

    def __init__(self, *args: str, command: Sequence[str] = (COMMAND,)) -> None:
        self.process = subprocess.Popen(
            [*command, *args],
            env=environment(PYTHONUNBUFFERED="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []

    def wait_for(self, beginning: str) -> str:
        """Read until a line begins like this."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith(beginning):
                return line
        raise AssertionError(f"ended with {self.process.wait()} before {beginning!r}:\n{''.join(self.lines)}")

    def end(self, timeout: float = 45) -> int:
        """Exit code; the rest of the output is in `lines`."""
        begin = time.monotonic()
        rest, _ = self.process.communicate(timeout=timeout)
        self.lines += rest.splitlines(keepends=True)
        self.seconds = time.monotonic() - begin
        return self.process.returncode

    def ranks(self) -> dict[int, int]:
        """Process id of every rank."""
        import psutil

        children = psutil.Process(self.process.pid).children()
        return {int(child.environ()["RANK"]): child.pid for child in children if "RANK" in child.environ()}


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
            env=environment(DS_ACCELERATOR="cpu"),
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
        if SampleOrder.of(manifest, "train", seq_length=length, seed=seed, shuffle_shards=1).locate(0)[1] == first
    )
    for index, shard in enumerate(shards):
        if index != first:
            path = manifest.shard_path(shard)
            with tarfile.open(path) as tar:
                at = tar.getmembers()[0].offset_data
            content = bytearray(path.read_bytes())
            content[at : at + 16] = bytes(16)  # the payload's own header; the tar is as long as before
            path.write_bytes(content)
    return Damaged(folder, seed, shards[first].tokens // length)
