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
