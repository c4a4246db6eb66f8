"""What is where in a checkpoint: rectangles of logical tensors, spread over one safetensors file a rank.

index.json maps a logical tensor to its shape and, for each state, to the rectangles: file, key, offset, shape.
JSON and safetensors only: nothing in it is unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_bit.errors import UserError
from megatron_bit.parallel.logical import Piece


@dataclass(frozen=True)
class Rectangle:
    """A box of a logical tensor (one or two dimensions)."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def intersect(self, other: Rectangle) -> Rectangle | None:
        low = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        high = tuple(
            min(a + n, b + m) for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        shape = tuple(h - lo for lo, h in zip(low, high, strict=True))
        return Rectangle(low, shape) if all(n > 0 for n in shape) else None

    def slices(self, origin: tuple[int, ...]) -> tuple[slice, ...]:
        """Index of this box in a tensor whose first element is at `origin`."""
        return tuple(slice(o - g, o - g + n) for o, g, n in zip(self.offset, origin, self.shape, strict=True))


def flat_rectangles(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[tuple[int, Rectangle]]:
    """Cut elements [start, stop) of a row-major tensor into boxes; yields (first element, box), in order.

    ZeRO shards flat ranges. A range of a matrix is at most a piece of a row, whole rows, and a piece of a row.
    """
    if len(shape) == 1:
        yield start, Rectangle((start,), (stop - start,))
        return
    columns = shape[1]
    while start < stop:
        row, column = divmod(start, columns)
        if column or stop - start < columns:
            width = min(columns - column, stop - start)
            yield start, Rectangle((row, column), (1, width))
            start += width
        else:
            rows = (stop - start) // columns
            yield start, Rectangle((row, 0), (rows, columns))
            start += rows * columns


def owned_rectangles(part: Piece, start: int, count: int) -> Iterator[tuple[int, Rectangle]]:
    """Where elements [start, start + count) of a flattened local parameter lie in the logical tensor of one piece.

    Yields (first element, counted from `start`; rectangle of the logical tensor), in order; nothing if they miss it.
    """
    first = part.row * part.row_elements  # of the piece, in the flattened local parameter
    low, high = max(start, first), min(start + count, first + part.numel)
    if low >= high:
        return
    for begin, box in flat_rectangles(low - first, high - first, part.shape):
        offset = tuple(a + b for a, b in zip(box.offset, part.offset, strict=True))
        yield begin + first - start, Rectangle(offset, box.shape)


class Reader:
    """Reads any box of any logical tensor of one checkpoint."""

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self._folder = folder
        self._index = index
        self._files: dict[str, Any] = {}

    def names(self) -> Iterator[tuple[str, str]]:
        """(tensor, state) of everything in it."""
        for name, entry in self._index.items():
            for state in entry["states"]:
                yield name, state

    def has(self, name: str, state: str) -> bool:
        """Whether the checkpoint has this state of the tensor."""
        return state in self._index.get(name, {"states": ()})["states"]

    def shape(self, name: str) -> tuple[int, ...]:
        """UserError if the checkpoint has no tensor of this name."""
        if name not in self._index:
            raise UserError(f"checkpoint {self._folder} has no tensor {name}; it is of another model")
        return tuple(self._index[name]["shape"])

    def read(self, name: str, state: str, box: Rectangle) -> Tensor:
        """float32 tensor of box.shape."""
        self.shape(name)
        out = torch.empty(box.shape)
        filled = 0
        for entry in self._index[name]["states"].get(state, ()):
            have = Rectangle(tuple(entry["offset"]), tuple(entry["shape"]))
            common = box.intersect(have)
            if common is not None:
                out[common.slices(box.offset)] = self._part(entry, common.slices(have.offset))
                filled += common.numel
        if filled != box.numel:
            raise UserError(
                f"checkpoint {self._folder} holds {filled} of the {box.numel} values of {name} ({state}) asked for; "
                "it is incomplete"
            )
        return out

    def _part(self, entry: dict[str, Any], where: tuple[slice, ...]) -> Tensor:
        path = self._folder / entry["file"]
        try:
            view = self._file(entry["file"]).get_slice(entry["key"])
        except SafetensorError as error:
            raise UserError(f"checkpoint file {path} does not hold what its index says: {error}") from None
        if list(view.get_shape()) != list(entry["shape"]):
            raise UserError(
                f"checkpoint file {path} does not hold what its index says: {entry['key']} has shape "
                f"{view.get_shape()} there, and {list(entry['shape'])} in the index"
            )
        return view[where]

    def _file(self, name: str) -> Any:
        if name not in self._files:
            path = self._folder / name
            try:
                self._files[name] = safe_open(str(path), framework="pt")
            except Exception as error:  # safetensors raises its own type, and FileNotFoundError
                raise UserError(f"checkpoint file {path} cannot be read: {error}") from None
        return self._files[name]
