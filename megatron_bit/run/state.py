"""TrainState: everything that a run carries from step to step besides weights and optimizer state."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """A handful of counters; the data cursor is one of them, and random numbers are functions of them."""

    step: int = 0  # global batches done
    samples: int = 0  # samples consumed: the data cursor
    tokens: int = 0
    skipped: int = 0  # updates skipped, for non-finite gradients or by the spike guard
    loss_mean: float = 0.0  # running mean of the loss, for the spike guard
    replaced: int = 0  # samples taken from other shards than their own, which was damaged
    good: int = -1  # the last step behind which the weights gave a finite loss; -1: none yet
    rewinds: int = 0  # how often the run went back to such a step
    damaged: list[str] = field(default_factory=list)  # SHA-256 of shards the run goes on without (data.on_error=skip)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
