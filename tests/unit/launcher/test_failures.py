"""Which rank failed first, told from their logs."""

from __future__ import annotations

import os
from pathlib import Path

from mbit_launcher.failures import first_failure

TRACEBACK = """[rank 2] failed:
Traceback (most recent call last):
  File "x.py", line 1, in <module>
    f()
ValueError: the reason
and its second line
"""
FOLLOWER = "step 3\n[rank 0] stopped: another rank has ended (Connection closed by peer)\n"
VICTIM = """[rank 1] failed:
Traceback (most recent call last):
  File "x.py", line 1, in <module>
torch.distributed.DistBackendError: Connection closed by peer [10.0.0.1]:1
"""


def _log(folder: Path, rank: int, node: str, text: str, time: float) -> None:
    path = folder / f"rank-{rank:05d}.{node}.log"
    path.write_text(text)
    os.utime(path, (time, time))


def test_the_cause_and_not_what_followed(tmp_path: Path) -> None:
    _log(tmp_path, 0, "n1", FOLLOWER, 1)
    _log(tmp_path, 1, "n1.cluster.org", VICTIM, 2)  # written before, and says itself that it follows from another
    _log(tmp_path, 2, "n2.cluster.org", TRACEBACK, 3)
    _log(tmp_path, 3, "n2", "megatron-bit: error: data/x.tar has changed\n", 4)
    failure = first_failure(tmp_path)
    assert failure is not None
    assert str(failure) == "rank 2 on n2.cluster.org: ValueError: the reason"
    assert failure.text.startswith("Traceback") and failure.text.endswith("second line\n")
    (tmp_path / "rank-00002.n2.cluster.org.log").unlink()
    assert str(first_failure(tmp_path)) == "rank 3 on n2: data/x.tar has changed"


def test_nobody_says_anything(tmp_path: Path) -> None:
    _log(tmp_path, 0, "n1", "step 1 loss 3, no error at all\n", 1)
    assert first_failure(tmp_path) is None
    assert first_failure(tmp_path / "none") is None
