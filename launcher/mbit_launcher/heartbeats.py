"""Heartbeats, as the launcher reads them: RUN/heartbeats/rank-00000, written by `callbacks/heartbeat.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heartbeat:
    rank: int
    host: str
    attempt: str  # "JOB.RESTART", empty outside of a job
    step: int  # of the run
    done: int  # steps since this start
    time: float  # when the step was done, by the host's clock
    ended: bool  # left the training loop, by whichever way Python knows


def read(run: Path, attempt: str | None = None) -> list[Heartbeat]:
    """Of all ranks, by rank; with `attempt` only those of that attempt. What is cut or not there is left out."""
    found = []
    for path in sorted((run / "heartbeats").glob("rank-*")):
        try:
            beat = Heartbeat(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue
        if attempt is None or beat.attempt == attempt:
            found.append(beat)
    return found
