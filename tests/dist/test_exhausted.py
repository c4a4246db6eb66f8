"""A rank that runs out of something ends the job: one line of it, one exit code of all, and nobody waits long."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from gloo_ranks import end_ranks, run_ranks

SETTINGS: dict[str, Any] = {
    "train.steps": 8, "checkpoint.every": 2, "evaluate.every": 3, "evaluate.samples": 4, "evaluate.initial": False,
    "parallel.timeout_minutes": 10,
}  # fmt: skip
CASES = [  # where, what, victim, world, layout
    ("init", "threads", 1, 2, {}),
    ("init", "threads", 0, 2, {}),
    ("groups", "memory", 1, 2, {}),
    ("groups", "threads", 0, 2, {}),
    ("step", "allocator", 0, 2, {"parallel.tp": 2}),
    ("step", "address space", 3, 4, {"parallel.tp": 2, "parallel.pp": 2}),
    ("step", "descriptors", 1, 2, {"parallel.zero_stage": 1}),
    ("validation", "memory", 1, 2, {}),
    ("save", "memory", 1, 2, {}),
    ("save", "descriptors", 0, 2, {}),
    ("snapshot", "allocator", 1, 2, {}),
    ("data", "memory", 1, 2, {"data.on_error": "skip"}),
    ("step", "memory", 0, 1, {}),
]
NAMES = {"threads": "threads or processes", "descriptors": "file descriptors"}


@pytest.mark.parametrize(("where", "what", "victim", "world", "layout"), CASES)
def test_one_line_and_one_exit_code(
    where: str, what: str, victim: int, world: int, layout: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    arguments = tiny_runs.overrides(tmp_path / "run", tiny_data, {**SETTINGS, **layout})
    (tmp_path / "empty.yaml").write_text("{}\n")
    arguments.insert(0, str(tmp_path / "empty.yaml"))
    said = tmp_path / "said"
    codes, seconds = end_ranks(tiny_runs.train_exhausted, world, arguments, victim, where, what, said)
    lines = said.read_text().splitlines()
    assert codes == [88] * world, lines
    assert len(lines) == 1, lines
    assert f"rank {victim} on {socket.gethostname()}" in lines[0]
    assert f"ran out of {NAMES.get(what, 'memory')}: " in lines[0]
    assert seconds < 60  # and not the ten minutes of the time-out


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"parallel.tp": 2}),
    (4, {"parallel.zero_stage": 1}),
    (4, {"parallel.tp": 2, "parallel.pp": 2}),
]


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_the_estimate_of_descriptors(world: int, layout: dict[str, Any], tiny_data: Path, tmp_path: Path) -> None:
    """Enough, and not far from what a rank comes to have open."""
    settings = {**SETTINGS, "log.to": ["tensorboard"], "data.on_error": "skip", **layout}
    arguments = tiny_runs.overrides(tmp_path / "run", tiny_data, settings)
    for most, estimate in run_ranks(tiny_runs.train_counted, world, arguments):
        assert most <= estimate <= 1.6 * most, (most, estimate)


@pytest.mark.parametrize(("world", "few"), [(1, [0]), (2, [1]), (2, [0, 1]), (4, [2])])
def test_too_few_descriptors(world: int, few: list[int], tiny_data: Path, tmp_path: Path) -> None:
    """Of one rank or of all: rank 0 says how many there are and what to do; all leave, and nothing is begun."""
    (tmp_path / "empty.yaml").write_text("{}\n")
    run, said = tmp_path / "run", tmp_path / "said"
    arguments = [str(tmp_path / "empty.yaml"), *tiny_runs.overrides(run, tiny_data, SETTINGS)]
    codes, seconds = end_ranks(tiny_runs.train_limited, world, arguments, few, said)
    (line,) = said.read_text().splitlines()
    assert codes == [2] * world
    match = re.search(r"(\d+) open files .* on (\S+): .* needs about (\d+).*`ulimit -n (\d+)`", line)
    assert match is not None, line
    allowed, needed, advised = (int(match[number]) for number in (1, 3, 4))
    assert allowed == tiny_runs.FEW < needed <= advised and match[2] == socket.gethostname()
    assert world == 1 or f"rank {few[0]} of {world} ranks" in line
    assert seconds < 15 and not run.exists()


def test_the_advised_limit_is_enough(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("{}\n")
    arguments = [str(tmp_path / "empty.yaml"), *tiny_runs.overrides(tmp_path / "run", tiny_data, SETTINGS)]
    codes, _ = end_ranks(tiny_runs.train_limited, 2, arguments, [0, 1], tmp_path / "said", 256)
    assert codes == [0, 0], (tmp_path / "said").read_text()
