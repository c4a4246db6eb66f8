"""Logs of a run that goes on at an earlier step than it had reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_bit.run.log import roll_back


def _write(path: Path, steps: list[int], rest: str = "") -> None:
    path.write_text("".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in steps) + rest)


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("step", "kept", "moved"), [(3, [1, 2, 3], [4, 5]), (5, [1, 2, 3, 4, 5], []), (0, [], [1, 2, 3, 4, 5])]
)
def test_each_step_once(tmp_path: Path, step: int, kept: list[int], moved: list[int]) -> None:
    _write(tmp_path / "log.jsonl", [1, 2, 3, 4, 5])
    roll_back(tmp_path, step)
    assert _steps(tmp_path / "log.jsonl") == kept
    assert _steps(tmp_path / "rolled_back.jsonl") == moved
    roll_back(tmp_path, step)
    assert _steps(tmp_path / "rolled_back.jsonl") == moved


def test_a_cut_line_goes(tmp_path: Path) -> None:
    _write(tmp_path / "log.jsonl", [1, 2], '{"step": 3, "lo')
    roll_back(tmp_path, 7)
    assert _steps(tmp_path / "log.jsonl") == [1, 2]
    assert (tmp_path / "rolled_back.jsonl").read_text() == '{"step": 3, "lo\n'


def test_a_validation_of_the_untrained_model_is_made_again_only_from_the_beginning(tmp_path: Path) -> None:
    for step, kept in ((5, [0, 5]), (0, [])):
        _write(tmp_path / "validation.jsonl", [0, 5, 10])
        roll_back(tmp_path, step)
        assert _steps(tmp_path / "validation.jsonl") == kept


def test_no_logs_yet(tmp_path: Path) -> None:
    roll_back(tmp_path, 3)
    assert not list(tmp_path.iterdir())
