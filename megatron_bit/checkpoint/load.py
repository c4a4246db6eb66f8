"""Load: any layout reads any checkpoint, because both speak of logical tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_bit.checkpoint.index import Reader, Rectangle, owned_rectangles
from megatron_bit.errors import UserError
from megatron_bit.model.chunk import noise_tables
from megatron_bit.optim.optimizer import EMA, Optimizer
from megatron_bit.parallel.agree import on_rank0
from megatron_bit.parallel.groups import Groups
from megatron_bit.parallel.logical import Piece, pieces
from megatron_bit.precision.linears import FP8, Scaling, restore_scaling
from megatron_bit.run import checkpoint_schema as schema
from megatron_bit.run.checkpoints import complete, names, problems, read_meta


def newest_undamaged(root: Path, groups: Groups) -> Path | None:
    """The newest complete checkpoint whose every file has its hash; None if there is no checkpoint. All ranks call it.

    The ranks divide the files between them. What is skipped is said, with the reason.

    Raises:
        UserError: on all ranks, if there are checkpoints and each of them is damaged.
    """
    found: list[Path] = on_rank0(lambda: complete(root))
    first = ""
    for folder in reversed(found):
        share: list[str] = problems(folder, groups.rank, groups.dims.world_size)
        shares: list[list[str]] = [[] for _ in range(groups.dims.world_size)]
        dist.all_gather_object(shares, share)
        bad = [line for lines in shares for line in lines]
        if not bad:
            return folder
        first = first or bad[0]
        if groups.rank == 0:
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            print(f"skipping checkpoint {folder.name}: {bad[0]}{more}", flush=True)
    if found:
        raise UserError(
            f"all {len(found)} checkpoints in {root} are damaged ({names(found)}): {first}; restore one from a backup, "
            "or remove them (`megatron-bit checkpoint rm`) to begin anew"
        )
    return None


def load_optimizer(folder: Path, optimizer: Optimizer, groups: Groups) -> None:
    """Fill master weights and moments of this rank; `optimizer.loaded` then refreshes the model, on all ranks.

    An average of the weights that the checkpoint does not have begins with the weights.
    """
    reader = open_reader(folder)
    layout = [pieces(chunk, groups) for chunk in optimizer.chunks]
    for fragment in optimizer.fragments():
        for part in layout[fragment.chunk][fragment.name]:
            _check_shape(reader, part)
            count = fragment.states["param"].numel()
            for at, place in owned_rectangles(part, fragment.start, count):
                for state, tensor in fragment.states.items():
                    source = state if state != EMA or reader.has(part.name, EMA) else "param"
                    tensor.narrow(0, at, place.numel).copy_(reader.read(part.name, source, place).flatten())


def load_scaling(folder: Path, chunks: Sequence[nn.Module]) -> None:
    """Fill what delayed FP8 scaling knows of this rank's layers; what the checkpoint has nothing of begins anew."""
    reader = open_reader(folder)

    def read(name: str) -> Scaling | None:
        names = [f"{name}.{kind}" for kind in Scaling._fields]
        if not all(reader.has(one, FP8) for one in names):
            return None
        shapes = [reader.shape(one) for one in names]
        return Scaling(
            *(reader.read(one, FP8, Rectangle((0,) * len(s), s)) for one, s in zip(names, shapes, strict=True))
        )

    restore_scaling(chunks, read)


@torch.no_grad()
def load_weights(folder: Path, chunks: Sequence[nn.Module], groups: Groups) -> None:
    """Fill the model's weights alone, from the fp32 masters, and its noise table: for evaluation and generation."""
    reader = open_reader(folder)
    load_noise_table(read_meta(folder), chunks)
    for chunk in chunks:
        parameters = dict(chunk.named_parameters())
        for name, parts in pieces(chunk, groups).items():
            for part in parts:
                _check_shape(reader, part)
                part.of(parameters[name]).copy_(reader.read(part.name, "param", Rectangle(part.offset, part.shape)))


def load_noise_table(meta: Mapping[str, Any], chunks: Sequence[nn.Module]) -> None:
    """Restore the measured noise levels, if the model has a table and the checkpoint too; a run that turns it on later
    begins with an empty one. UserError if the table was measured over another range."""
    if "noise_table" in meta:
        for table in noise_tables(chunks):
            table.load(meta["noise_table"])


def open_reader(folder: Path) -> Reader:
    """Random access to the tensors of a checkpoint; UserError if it has no readable index."""
    return Reader(folder, schema.read(folder, "index.json", schema.INDEX))


def _check_shape(reader: Reader, part: Piece) -> None:
    have = reader.shape(part.name)
    if have != part.full_shape:
        raise UserError(
            f"checkpoint tensor {part.name} has shape {have}, the model wants {part.full_shape}; it is another model"
        )
