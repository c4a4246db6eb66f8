"""`train.init_from`: the weights that a new run starts with, from a run, a checkpoint or a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron_bit.checkpoint.huggingface import HuggingFaceWeights
from megatron_bit.checkpoint.index import Rectangle, owned_rectangles
from megatron_bit.checkpoint.load import open_reader
from megatron_bit.errors import UserError
from megatron_bit.optim.optimizer import EMA, Optimizer
from megatron_bit.parallel.groups import Groups
from megatron_bit.parallel.logical import pieces
from megatron_bit.run import identity
from megatron_bit.run.checkpoints import problems, read_meta
from megatron_bit.run.folder import newest_checkpoint


class Weights(Protocol):
    """Where weights come from."""

    @property
    def partial(self) -> bool:
        """The backbone's layers alone; the rest keeps its own initial values."""
        ...

    def has(self, name: str) -> bool: ...

    def read(self, name: str, full_shape: tuple[int, ...], box: Rectangle) -> Tensor: ...


class CheckpointWeights:
    """The fp32 masters of a checkpoint of ours."""

    partial = False

    def __init__(self, folder: Path) -> None:
        self._reader = open_reader(folder)
        self._folder = folder

    def has(self, name: str) -> bool:
        return True

    def read(self, name: str, full_shape: tuple[int, ...], box: Rectangle) -> Tensor:
        shape = self._reader.shape(name)
        if shape != full_shape:
            raise UserError(f"checkpoint tensor {name} has shape {shape}, the model wants {full_shape}")
        return self._reader.read(name, "param", box)


def open_weights(source: str, mine: dict[str, Any], groups: Groups) -> Weights:
    """Where a new run's weights come from; looked at before anything of the run is written.

    Args:
        mine: the identity of the run that begins.

    Raises:
        UserError: no such weights, damaged ones, or weights of a model with other sizes, tokens or codes.
    """
    path = Path(source)
    if (path / "config.json").exists():
        weights = HuggingFaceWeights(path)
        weights.check(mine, f"train.init_from {path}")
        return weights
    folder = newest_checkpoint(path)
    where = f"train.init_from {folder}"
    if found := problems(folder, groups.rank, groups.dims.world_size):
        raise UserError(f"train.init_from {path}: {found[0]}")
    identity.compare_model(identity.model_of(identity.of_checkpoint(read_meta(folder), where)), mine, where)
    return CheckpointWeights(folder)


def fill(weights: Weights, optimizer: Optimizer, groups: Groups) -> None:
    """Fill this rank's masters; `optimizer.loaded(0)` then refreshes the model, on all ranks. UserError: a tensor that
    is missing or of another shape."""
    layout = [pieces(chunk, groups) for chunk in optimizer.chunks]
    for fragment in optimizer.fragments():
        target = fragment.states["param"]
        for part in layout[fragment.chunk][fragment.name]:
            if not weights.has(part.name):
                continue
            for at, place in owned_rectangles(part, fragment.start, target.numel()):
                target.narrow(0, at, place.numel).copy_(weights.read(part.name, part.full_shape, place).flatten())
        if EMA in fragment.states:
            fragment.states[EMA].copy_(target)
