"""What a rank saves: a copy of the optimizer state it holds, and that copy as a safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_bit.checkpoint.index import owned_rectangles
from megatron_bit.errors import UserError
from megatron_bit.io.files import announce
from megatron_bit.io.safetensors_file import Spec, write_file
from megatron_bit.optim.optimizer import Optimizer
from megatron_bit.parallel.groups import Groups
from megatron_bit.parallel.logical import pieces
from megatron_bit.precision.linears import FP8, scaled_layers


class Snapshot(NamedTuple):
    """One rank's part of a checkpoint, on the host."""

    tensors: dict[str, Tensor]  # float32, by key
    index: dict[str, Any]  # logical name -> {"shape", "states": {state: [{"file", "key", "offset", "shape"}]}}

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def snapshot(optimizer: Optimizer, groups: Groups, reuse: dict[str, Tensor]) -> Snapshot:
    """Copy this rank's optimizer state out of the device (or of the way of the next step).

    Args:
        reuse: buffers by key, kept from save to save (pinned on a GPU machine); filled here.
    """
    file = file_name(groups.rank)
    tensors: dict[str, Tensor] = {}
    index: dict[str, Any] = {}
    layout = [pieces(chunk, groups) for chunk in optimizer.chunks]
    for fragment in optimizer.fragments():
        if not fragment.saved:
            continue
        for part in layout[fragment.chunk][fragment.name]:
            if part.full_shape == part.shape and groups.tp_rank > 0:
                continue  # replicated over TP: the first rank writes it
            count = fragment.states["param"].numel()
            for at, place in owned_rectangles(part, fragment.start, count):
                entry = index.setdefault(
                    part.name, {"shape": part.full_shape, "states": {s: [] for s in fragment.states}}
                )
                for state in fragment.states:
                    key = f"{part.name}/{state}/{'-'.join(map(str, place.offset))}"
                    view = fragment.states[state].detach().narrow(0, at, place.numel).view(place.shape)
                    tensors[key] = _copy(view, key, reuse)
                    entry["states"][state].append(
                        {"file": file, "key": key, "offset": place.offset, "shape": place.shape}
                    )
    if groups.tp_rank == groups.dp_rank == 0:  # all that share a layer have the same
        for name, _, scaling in scaled_layers(optimizer.chunks):
            for kind, tensor in scaling._asdict().items():
                key, shape = f"{name}/{kind}", tuple(tensor.shape)
                tensors[key] = _copy(tensor, key, reuse)
                place = {"file": file, "key": key, "offset": (0,) * len(shape), "shape": shape}
                index[f"{name}.{kind}"] = {"shape": shape, "states": {FP8: [place]}}
    if groups.device.type == "cuda":
        torch.cuda.synchronize()
    return Snapshot(tensors, index)


def _copy(view: Tensor, key: str, reuse: dict[str, Tensor]) -> Tensor:
    buffer = reuse.get(key)
    if buffer is None or buffer.shape != view.shape:
        buffer = reuse[key] = torch.empty(view.shape, dtype=view.dtype, pin_memory=view.device.type == "cuda")
    return buffer.copy_(view, non_blocking=True)


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def write_rank(folder: Path, rank: int, part: Snapshot) -> None:
    """Write one rank's file, and last `rank-N.json`, which says that it is there; UserError if that fails."""
    specs = [Spec(key, tuple(tensor.shape), tensor.dtype) for key, tensor in part.tensors.items()]
    write_part(folder, rank, specs, part.tensors.values(), part.index)


def write_part(
    folder: Path, rank: int, specs: Sequence[Spec], tensors: Iterable[Tensor], index: Mapping[str, Any]
) -> None:
    """The same of tensors that need not be in memory together, with an index as of `Snapshot`."""
    path = folder / file_name(rank)
    try:
        total = hashlib.sha256()
        size = write_file(path, specs, tensors, also=total.update)
        files = {path.name: {"sha256": total.hexdigest(), "bytes": size}}
        announce(folder / f"rank-{rank:05d}.json", json.dumps({"index": index, "files": files}).encode())
    except OSError as error:
        raise UserError(f"checkpoint file {path} cannot be written: {error.strerror}") from None
