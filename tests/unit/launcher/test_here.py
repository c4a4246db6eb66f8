"""What is known of a run that no job trains, out of its folder alone."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import manifests
import pytest
from mbit_launcher import here
from mbit_launcher.profile import ClusterProfile
from mbit_launcher.submit import prepare, submit

from megatron_bit.config import load_config
from megatron_bit.errors import UserError
from megatron_bit.run.lock import RunLock, holder


def _lock(run: Path, **said: Any) -> None:
    (run / "lock").write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": "now", **said}))


def _beat(run: Path, rank: int, age: float = 0.0, ended: bool = False) -> None:
    (run / "heartbeats").mkdir(exist_ok=True)
    record = {"rank": rank, "host": "h", "attempt": "", "step": 3, "done": 3, "time": time.time() - age, "ended": ended}
    (run / "heartbeats" / f"rank-{rank:05d}").write_text(json.dumps(record))


def test_who_holds_a_run(tmp_path: Path) -> None:
    assert holder(tmp_path) is None and here.state(tmp_path)[0] == "not started"
    lock = RunLock(tmp_path)
    lock.acquire()
    held = here.training(tmp_path)
    assert held is not None and (held.pid, held.alive) == (os.getpid(), True)
    assert here.state(tmp_path)[::2] == ("running", f"process {os.getpid()}")
    lock.release()
    assert here.training(tmp_path) is None  # the file still names this process, which has it open no more


@pytest.mark.parametrize("said", [{"pid": -1}, {"pid": 0}, {"pid": 1}, {"pid": 2**40}, {"pid": os.getpid()}])
def test_a_lock_that_names_another_process_ends_none(said: dict[str, Any], tmp_path: Path) -> None:
    _lock(tmp_path, **said)
    assert here.cancel(tmp_path, now=True) == f"{tmp_path}: no process trains it"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"host": "h"}', '{"host": "h", "pid": "x"}', "[" * 9999])
def test_a_lock_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(text)
    assert holder(tmp_path) is None


def test_a_run_of_another_machine_is_known_by_its_heartbeats(tmp_path: Path) -> None:
    _lock(tmp_path, host="elsewhere", pid=7)
    assert here.training(tmp_path) is None
    _beat(tmp_path, 0)
    assert here.state(tmp_path) == ("running", "elsewhere", "process 7 on elsewhere, by its files")
    with pytest.raises(UserError, match=r"trained by process 7 on elsewhere, which cannot be ended from here"):
        here.cancel(tmp_path, now=False)
    _beat(tmp_path, 0, age=here.SILENT_SECONDS + 1)
    assert here.state(tmp_path)[0] == "ended"
    _beat(tmp_path, 0, ended=True)
    assert here.state(tmp_path)[0] == "stopped"
    (tmp_path / "DIVERGED").write_text("at step 3\n")
    assert here.state(tmp_path) == ("failed", "", "DIVERGED: at step 3")


def test_ranks_are_those_of_the_newest_start(tmp_path: Path) -> None:
    (tmp_path / "starts").mkdir()
    assert here.ranks(tmp_path) == 1
    for rank in range(4):
        _beat(tmp_path, rank, age=100)
    start = tmp_path / "starts" / "0001.yaml"
    start.write_text("")
    os.utime(start, (time.time() - 50, time.time() - 50))
    assert here.ranks(tmp_path) == 1  # of the newest start none has done anything yet
    for rank in range(2):
        _beat(tmp_path, rank)
    assert here.ranks(tmp_path) == 2


def test_the_log_is_read_from_its_end_and_goes_on(tmp_path: Path) -> None:
    def line(step: int) -> str:
        return json.dumps({"step": step, "loss": 1 / step, "tokens_per_second": 9.0}) + "\n"

    path = tmp_path / "log.jsonl"
    path.write_text("".join(map(line, range(1, 1001))) + '{"step": 1001, "lo')
    (tmp_path / "validation.jsonl").write_text('{"step": 1000, "nats_per_token_bound": 2, "standard_error": 0.5}\n')
    log = here.Log(tmp_path)
    last = log.last(3)
    assert [text.split()[1] for text in last] == ["999", "1000", "1000"] and "validation 2 +- 0.5" in last[2]
    path.write_text("".join(map(line, range(1, 1002))) + f'{{"step": 1002, "loss": {10**400}}}\n[]\nnull\n')
    assert [text.split()[1] for text in log.more()] == ["1001", "1002"] and log.over
    assert log.more() == []


def test_a_run_that_a_process_trains_is_not_submitted(tmp_path: Path) -> None:
    manifests.bare(tmp_path / "data")
    config = load_config(None, [f"run={tmp_path / 'run'}", f"data.path={tmp_path / 'data'}"], "laptop")
    (tmp_path / "run").mkdir()
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    profile = ClusterProfile(nodes=2, ranks_per_node=2)
    assert prepare(config, profile).run == str(tmp_path / "run")
    with pytest.raises(UserError, match=rf"is trained by process {os.getpid()} on .*megatron-bit cancel"):
        submit(config, profile)
    lock.release()
