"""Heartbeats, as the launcher reads them: RUN/heartbeats/rank-00000, written by `callbacks/heartbeat.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from megatron_bit.errors import UserError
from megatron_bit.io.strict_json import Count, load

MOST_BYTES = 4096


@dataclass(frozen=True)
class Heartbeat:
    rank: Count
    host: Annotated[str, Field(max_length=256)]
    attempt: Annotated[str, Field(max_length=64)]  # "JOB.RESTART", empty outside of a job
    step: Count  # of the run
    done: Count  # steps since this start
    time: Annotated[float, Field(allow_inf_nan=False)]  # when the step was done, by the host's clock
    ended: bool  # left the training loop, by whichever way Python knows


_SCHEMA = TypeAdapter(Heartbeat)


def read(run: Path, attempt: str | None = None) -> list[Heartbeat]:
    """Of all ranks, by rank; with `attempt` only those of that attempt. What is cut or not there is left out."""
    found = []
    for path in sorted((run / "heartbeats").glob("rank-*")):
        try:
            beat = load(path, _SCHEMA, str(path), MOST_BYTES, "")
        except UserError:
            continue
        if attempt is None or beat.attempt == attempt:
            found.append(beat)
    return found
