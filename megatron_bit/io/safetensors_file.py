"""Safetensors files written tensor by tensor: the header follows from names, shapes and dtypes alone.

The library's own writer wants all tensors of a file at once, and copies them once more while it holds Python's lock. A
checkpoint is written beside a training step, a conversion is of models larger than memory: neither can have that.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8"}


@dataclass(frozen=True)
class Spec:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(
    path: Path,
    specs: Sequence[Spec],
    tensors: Iterable[Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    also: Callable[[bytes | memoryview], object] | None = None,
) -> int:
    """Write one file, synced; returns its size in bytes. Raises OSError.

    Args:
        specs: in the order of `tensors`, of which one is in memory at a time.
        tensors: on the host, with the shapes and dtypes of `specs`.
        also: gets every piece too, to hash it in the same pass.
    """
    with open(path, "wb") as file:

        def put(piece: bytes | memoryview) -> None:
            file.write(piece)
            if also is not None:
                also(piece)

        put(_header(specs, metadata))
        for spec, tensor in zip(specs, tensors, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), (spec, tensor.shape, tensor.dtype)
            put(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _header(specs: Sequence[Spec], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    return len(text).to_bytes(8, "little") + text
