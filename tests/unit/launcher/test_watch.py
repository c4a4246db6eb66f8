"""The watchdog: what it takes for a hang, and what not."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mbit_launcher.heartbeats import read
from mbit_launcher.submission import Submission
from mbit_launcher.watch import HANGS, STOP, watch

KEYS: dict[str, Any] = {"ranks_per_node": 2, "nodes": 1, "hang_timeout": 0.6, "start_timeout": 1.5}


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    folder = tmp_path / "run" / "slurm" / "0000"
    (folder / "logs" / "9.0").mkdir(parents=True)
    (folder / "cluster.yaml").write_text(yaml.safe_dump(KEYS))
    (tmp_path / "run" / "heartbeats").mkdir()
    return Submission(folder)


def _beat(run: Path, rank: int, step: int, done: int, attempt: str = "9.0") -> None:
    record = {"rank": rank, "host": "n1", "attempt": attempt, "step": step, "done": done, "time": 0.0, "ended": False}
    (run / "heartbeats" / f"rank-{rank:05d}").write_text(json.dumps(record))


def _watch(submission: Submission) -> tuple[int, float, str]:
    begin = time.monotonic()
    code = watch(submission, "9.0")
    said = submission.logs / "9.0" / "hung"
    return code, time.monotonic() - begin, said.read_text() if said.exists() else ""


def test_no_step(submission: Submission) -> None:
    _beat(submission.run, 0, 8, 3)
    _beat(submission.run, 1, 7, 2)
    code, seconds, said = _watch(submission)
    assert code == HANGS and 0.5 < seconds < 1.4
    assert "the last was 8; behind are rank 1 on n1 (step 7)" in said


def test_before_the_first_step_it_waits_longer(submission: Submission) -> None:
    _beat(submission.run, 0, 5, 0)
    _beat(submission.run, 1, 99, 9, attempt="8.0")  # of an attempt before: says nothing of this one
    code, seconds, said = _watch(submission)
    assert code == HANGS and 1.4 < seconds < 3
    assert "start_timeout" in said and "ranks [1] have not come to training" in said


def test_as_long_as_there_are_steps_it_waits(submission: Submission) -> None:
    def train() -> None:
        for step in range(1, 8):
            _beat(submission.run, 0, step, step)
            time.sleep(0.3)
        (submission.run / "STOP").touch()

    thread = threading.Thread(target=train)
    thread.start()
    code, seconds, said = _watch(submission)
    thread.join()
    assert (code, said) == (STOP, "") and seconds > 2


def test_a_heartbeat_is_read_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the trainer's own callback, over a longer line of an earlier start."""
    from types import SimpleNamespace

    from megatron_bit.training.callbacks.heartbeat import BYTES, HeartbeatCallback

    monkeypatch.setenv("MBIT_ATTEMPT", "9.1")
    trainer: Any = SimpleNamespace(run=tmp_path, state=SimpleNamespace(step=10), groups=SimpleNamespace(rank=3))
    callback = HeartbeatCallback()
    callback.start(trainer)
    (beat,) = read(tmp_path, "9.1")
    assert (beat.rank, beat.step, beat.done, beat.ended) == (3, 10, 0, False)
    trainer.state.step = 12
    callback.after_step(trainer)
    callback.finish(trainer)
    (beat,) = read(tmp_path)
    assert (beat.step, beat.done, beat.ended) == (12, 2, True) and abs(beat.time - time.time()) < 5
    assert (tmp_path / "heartbeats" / "rank-00003").stat().st_size == BYTES
    assert read(tmp_path, "9.0") == []


def test_a_rank_that_cannot_write_trains_on(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from megatron_bit.training.callbacks.heartbeat import HeartbeatCallback

    (tmp_path / "heartbeats").touch()  # a file, where the folder should be
    trainer: Any = SimpleNamespace(run=tmp_path, state=SimpleNamespace(step=1), groups=SimpleNamespace(rank=0))
    callback = HeartbeatCallback()
    callback.start(trainer)
    callback.after_step(trainer)
    callback.finish(trainer)
