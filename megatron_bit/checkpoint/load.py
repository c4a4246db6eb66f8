"""Load: any layout reads any checkpoint, because both speak of logical tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_bit.checkpoint.index import FORMAT, Reader, Rectangle, owned_rectangles
from megatron_bit.errors import UserError
from megatron_bit.model.logical import Piece, pieces
from megatron_bit.optim.optimizer import Optimizer
from megatron_bit.parallel.groups import Groups


def complete(root: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first."""
    return sorted(p.parent for p in root.glob("step-*/COMMITTED") if not p.parent.suffix)


def read_meta(folder: Path) -> dict[str, Any]:
    """The checkpoint's meta.json; UserError if it is not one of ours."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {folder} has no readable meta.json: {error}") from None
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise UserError(f"checkpoint {folder / 'meta.json'} has format {found}; this version reads {FORMAT}")
    return meta


def load_optimizer(folder: Path, optimizer: Optimizer, groups: Groups) -> None:
    """Fill master weights and moments of this rank; `optimizer.loaded` then refreshes the model, on all ranks."""
    reader = _reader(folder)
    layout = [pieces(chunk, groups) for chunk in optimizer.chunks]
    for fragment in optimizer.fragments():
        for part in layout[fragment.chunk][fragment.name]:
            _check_shape(reader, part)
            count = fragment.states["param"].numel()
            for at, place in owned_rectangles(part, fragment.start, count):
                for state, tensor in fragment.states.items():
                    tensor.narrow(0, at, place.numel).copy_(reader.read(part.name, state, place).flatten())


@torch.no_grad()
def load_weights(folder: Path, chunks: Sequence[nn.Module], groups: Groups) -> None:
    """Fill the model's weights alone, from the fp32 masters: for evaluation and generation."""
    reader = _reader(folder)
    for chunk in chunks:
        parameters = dict(chunk.named_parameters())
        for name, parts in pieces(chunk, groups).items():
            for part in parts:
                _check_shape(reader, part)
                part.of(parameters[name]).copy_(reader.read(part.name, "param", Rectangle(part.offset, part.shape)))


def _reader(folder: Path) -> Reader:
    try:
        return Reader(folder, json.loads((folder / "index.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {folder} has no readable index.json: {error}") from None


def _check_shape(reader: Reader, part: Piece) -> None:
    have = reader.shape(part.name)
    if have != part.full_shape:
        raise UserError(
            f"checkpoint tensor {part.name} has shape {have}, the model wants {part.full_shape}; it is another model"
        )
