"""A run's logs hold each step once: what a start does again is moved out of them. Imports no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path

ROLLED_BACK = "rolled_back.jsonl"


def roll_back(run: Path, step: int) -> None:
    """Move records of steps after `step` from log.jsonl and validation.jsonl to rolled_back.jsonl. Raises OSError.

    They are of a start that died after its last save; this one does those steps again. A last line that was cut goes
    with them. Rank 0 calls it, before the run goes on at `step`.
    """
    _cut(run, "log.jsonl", step)
    _cut(run, "validation.jsonl", step or -1)  # an untrained model is validated again


def last_step(path: Path) -> int | None:
    """The step of the last record of a log; None without one."""
    if not path.exists():
        return None
    lines = path.read_bytes().splitlines()
    step = _step(lines[-1]) if lines else float("inf")
    return None if step == float("inf") else int(step)


def sync(run: Path) -> None:
    """Bring the logs to the disk, before a checkpoint: its steps are not done again, whatever happens to the node."""
    for name in ("log.jsonl", "validation.jsonl"):
        if (run / name).exists():
            with open(run / name, "ab") as file:
                os.fsync(file.fileno())


def _cut(run: Path, name: str, step: int) -> None:
    path = run / name
    if not path.exists():
        return
    data = path.read_bytes()
    keep = len(data)
    while keep:  # from the end: what is done again is a short tail of a long log
        begin = data.rfind(b"\n", 0, keep - 1) + 1
        if data[keep - 1 : keep] == b"\n" and _step(data[begin:keep]) <= step:
            break
        keep = begin
    if keep == len(data):
        return
    tail = data[keep:] if data.endswith(b"\n") else data[keep:] + b"\n"
    with open(run / ROLLED_BACK, "ab") as file:
        file.write(tail)
        file.flush()
        os.fsync(file.fileno())
    os.truncate(path, keep)


def _step(line: bytes) -> float:
    """Of a record; infinity if it cannot be read."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
