"""The learning curves of a run, out of its logs: a point for many steps of a long one. Imports no torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POINTS = 500  # of a training curve, at most: a picture has no more
_TAIL_BYTES = 64 * 1024
_NO_RECORD = (ValueError, KeyError, TypeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Curves:
    """Of one run. x of a point is (tokens, step); y are nats per token."""

    run: Path
    train: list[tuple[float, float, float]] = field(default_factory=list)  # tokens, step, mean of the steps in between
    validation: list[tuple[float, float, float, float]] = field(default_factory=list)  # and standard error


def read_curves(run: Path) -> Curves:
    """From log.jsonl and validation.jsonl; lines that are cut, and losses that were no numbers, are left out."""
    found = Curves(run)
    width = max(1, math.ceil(_last_step(run / "log.jsonl") / POINTS))
    sums = [0.0, 0.0, 0.0, 0]  # tokens, step, nats, records
    for record in _records(run / "log.jsonl", "tokens", "step", "nats_per_token_bound"):
        bin_before = sums[1] / sums[3] if sums[3] else record[1]
        if sums[3] and (record[1] - 1) // width != (bin_before - 1) // width:
            found.train.append((sums[0] / sums[3], sums[1] / sums[3], sums[2] / sums[3]))
            sums = [0.0, 0.0, 0.0, 0]
        sums = [*(total + value for total, value in zip(sums, record, strict=False)), sums[3] + 1]
    if sums[3]:
        found.train.append((sums[0] / sums[3], sums[1] / sums[3], sums[2] / sums[3]))
    values = _records(run / "validation.jsonl", "tokens", "step", "nats_per_token_bound", "standard_error")
    found.validation.extend((r[0], r[1], r[2], r[3]) for r in values)
    return found


def _records(path: Path, *keys: str) -> Iterator[tuple[float, ...]]:
    """The values of these keys, line by line: memory does not grow with the log."""
    try:
        with open(path, "rb") as file:
            for line in file:
                try:
                    record: Any = json.loads(line)
                    values = tuple(float(record[key]) for key in keys)
                except _NO_RECORD:
                    continue
                if all(math.isfinite(value) for value in values):
                    yield values
    except OSError:
        return


def _last_step(path: Path) -> float:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0.0
    for line in reversed(lines):
        try:
            return float(json.loads(line)["step"])
        except _NO_RECORD:
            continue
    return 0.0
