"""Safetensors files written tensor by tensor: the header follows from names, shapes and dtypes alone.

The library's own writer wants all tensors of a file at once. Here a tensor is in memory only while it is written, so
that the peak is one tensor whatever the size of a shard.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
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


def plan_shards(specs: Sequence[Spec], shard_bytes: int) -> dict[str, list[Spec]]:
    """File name to its tensors, in the given order; a file is above `shard_bytes` only if one tensor is."""
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_shards(
    folder: Path,
    specs: Sequence[Spec],
    load: Callable[[str], Tensor],
    shard_bytes: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write all tensors, and model.safetensors.index.json if there is more than one file.

    Args:
        load: name to tensor (any floating dtype, or the one of its spec), called once for each, in order.
        progress: called with (bytes written, bytes in all) after every tensor.

    Raises:
        OSError: the folder cannot be written.
    """
    shards, done, total = plan_shards(specs, shard_bytes), 0, sum(spec.nbytes for spec in specs)
    for file, members in shards.items():
        with open(folder / file, "wb") as out:
            out.write(_header(members))
            for spec in members:
                tensor = load(spec.name).to(spec.dtype).contiguous()
                assert tuple(tensor.shape) == spec.shape, (spec, tensor.shape)
                out.write(tensor.flatten().view(torch.uint8).numpy().data)
                done += spec.nbytes
                progress(done, total)
            out.flush()
            os.fsync(out.fileno())
    if len(shards) > 1:
        weight_map = {spec.name: file for file, members in shards.items() for spec in members}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _header(specs: Sequence[Spec]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
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
