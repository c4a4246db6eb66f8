"""A run that has diverged goes back to a checkpoint: RUN/rewind.json says so, also to a start before the next save.

Checkpoints behind that one are set aside, under names that are none (`step-00000004.diverged-1`): they are of the way
that the run does not go. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from megatron_bit.errors import UserError
from megatron_bit.io.files import write_atomic
from megatron_bit.io.strict_json import MIB, Count, Sha256, load
from megatron_bit.run.checkpoints import complete, read_meta, step_of
from megatron_bit.run.state import TrainState

NAME = "rewind.json"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Rewind:
    """The newest time that a run went back."""

    step: Count  # of the checkpoint that it went back to
    samples: Count  # the data cursor from which it goes on there
    rewinds: Annotated[int, Field(ge=1, lt=2**62)]  # how often it has gone back, this time among them
    replaced: Count = 0
    damaged: list[Sha256] = field(default_factory=list)

    def leaves_behind(self, meta: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this meta.json is of the way that was left."""
        return meta["step"] > self.step and meta["state"].get("rewinds", 0) < self.rewinds

    def catch_up(self, state: TrainState) -> bool:
        """Bring a state of before up to it; whether it was of before."""
        if state.rewinds >= self.rewinds:
            return False
        state.samples, state.rewinds = max(state.samples, self.samples), self.rewinds
        state.replaced, state.damaged = self.replaced, list(self.damaged)
        state.good = max(state.good, min(state.step, self.step))  # a finite loss was seen, after it had been saved
        return True


_SCHEMA: TypeAdapter[Rewind] = TypeAdapter(Rewind)


def read(run: Path) -> Rewind | None:
    """The newest rewind of a run; UserError if its file is damaged."""
    path = run / NAME
    if not path.exists():
        return None
    advice = "remove it to go on as if the run had not gone back"
    return load(path, _SCHEMA, str(path), 64 * MIB, advice)


def write(run: Path, rewind: Rewind) -> None:
    """From here on the run has gone back, whenever it is killed. Raises OSError."""
    write_atomic(run / NAME, json.dumps(asdict(rewind)).encode())


def set_aside(run: Path, rewind: Rewind | None) -> Iterator[str]:
    """Rename the checkpoints that a rewind leaves behind; yields a line for each. Rank 0, as the owner of the run."""
    for folder in complete(run / "checkpoints") if rewind is not None else ():
        assert rewind is not None
        if (step_of(folder.name) or 0) <= rewind.step:
            continue
        try:
            meta = read_meta(folder)
        except UserError:
            continue  # damaged: it is not continued, and that is said
        if rewind.leaves_behind(meta):
            aside = _free(folder.with_name(f"{folder.name}.diverged-{rewind.rewinds}"))
            folder.rename(aside)
            yield f"set {folder} aside as {aside.name}: the run has gone back to step {rewind.step}"


def _free(path: Path) -> Path:
    """This name, or one with a number, that nothing has."""
    names = (path if not number else path.with_name(f"{path.name}-{number}") for number in range(10**6))
    return next(name for name in names if not name.exists())
