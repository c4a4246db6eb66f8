"""What the trainer, checkpoints and evaluation ask of an optimizer, whoever does the work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

STATES = ("param", "exp_avg", "exp_avg_sq")  # fp32 master weights and AdamW's moments
EMA = "ema"  # and, with optim.ema_decay, the average of the weights


class Fragment(NamedTuple):
    """The part of a local parameter whose optimizer state this rank holds."""

    chunk: int  # index of the model chunk
    name: str  # local parameter name
    start: int  # first element, in the flattened parameter
    states: dict[str, Tensor]  # float32 [numel] views, by the names in STATES, and EMA
    saved: bool = True  # False: another data-parallel rank holds the same and saves it


class Optimizer(ABC):
    """AdamW over this rank's chunks, with everything that data parallelism adds to it."""

    chunks: list[nn.Module]
    base: torch.optim.Optimizer  # its parameter groups carry `lr_scale`
    managed: bool  # pp = 1: it drives the backward pass itself; otherwise a pipeline schedule does

    @abstractmethod
    def forward_backward(self, batches: Sequence[Any]) -> list[Tensor]:
        """Forward and backward of all micro-batches (managed only); gradients are means over them.

        Each item is an argument of the model, which returns (loss, metrics). Returns the metrics.
        """

    @abstractmethod
    def forward(self, batch: Any) -> Any:
        """The model's output without gradients to come (managed only)."""

    @abstractmethod
    def step(self, lrs: Sequence[float]) -> None:
        """Reduce what is not reduced yet, clip by the global norm, update; non-finite gradients skip the update.

        Args:
            lrs: learning rate of every parameter group.
        """

    @abstractmethod
    def poison(self) -> None:
        """Make the next `step` skip its update, by the path of non-finite gradients. Call it on every rank."""

    @property
    @abstractmethod
    def skipped(self) -> Tensor | bool:
        """Whether the last step was skipped; the same on every rank. A tensor is read where waiting costs nothing."""

    @property
    @abstractmethod
    def grad_norm(self) -> Tensor | float:
        """Global gradient norm before clipping, of the last step."""

    @abstractmethod
    def create_states(self) -> None:
        """Give AdamW its (zero) moments now rather than at the first step, so that a checkpoint can fill them.

        The average of the weights, if one is kept, begins with the weights.
        """

    @abstractmethod
    def fragments(self) -> Iterator[Fragment]:
        """The optimizer state that this rank holds, by parameter. `create_states` must have been called once."""

    @property
    @abstractmethod
    def updates(self) -> int:
        """Updates applied so far (AdamW's step count, for its bias correction)."""

    @abstractmethod
    def loaded(self, updates: int) -> None:
        """Call after filling the fragments: sets the step count and refreshes the model's weights from the masters."""
