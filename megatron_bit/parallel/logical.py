"""Logical parameters: the names and shapes of the unsharded model, and which rectangle of them a rank holds.

Everything that has to survive a change of layout (initial values, checkpoints, conversion) speaks in these.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch import Tensor, nn

from megatron_bit.parallel.groups import Groups


@dataclass(frozen=True)
class Piece:
    """Rows [row, row + shape[0]) of a local parameter are a rectangle of the logical tensor `name`."""

    name: str
    full_shape: tuple[int, ...]
    offset: tuple[int, ...]  # of the rectangle in the logical tensor
    shape: tuple[int, ...]
    row: int  # first row in the local parameter

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def row_elements(self) -> int:
        """Elements of one row: 1 for a vector."""
        return math.prod(self.shape[1:])

    def of(self, tensor: Tensor) -> Tensor:
        """The view of a tensor with the local parameter's shape."""
        return tensor.narrow(0, self.row, self.shape[0])

    def slices(self) -> tuple[slice, ...]:
        """The rectangle as an index into the logical tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))


VOCABULARY = ("embedding.table.weight", "head.logits.weight")  # a row a token, and padded rows behind them
_GATED = re.compile(r"(^|\.)(linear_fc1|fc1)\.weight$")
_LAYER = re.compile(r"^backbone\.block\.layers\.(\d+)\.")


def is_gated(name: str) -> bool:
    """Whether a parameter stacks the gate and up matrices of a SwiGLU (each split over TP by itself)."""
    return bool(_GATED.search(name)) and ("mlp." in name or name.startswith("head.layers."))


def pieces(chunk: nn.Module, groups: Groups) -> dict[str, tuple[Piece, ...]]:
    """For every parameter of a chunk (by its local name) the logical rectangles it is made of."""
    _mark_tensor_parallel(chunk)
    return {name: _pieces(chunk, name, p, groups) for name, p in chunk.named_parameters()}


def _pieces(chunk: nn.Module, name: str, parameter: Tensor, groups: Groups) -> tuple[Piece, ...]:
    logical = logical_name(chunk, name)
    shape = tuple(_shape(parameter))
    if not getattr(parameter, "tensor_model_parallel", False):
        return (Piece(logical, shape, (0,) * len(shape), shape, 0),)
    dim, tp, rank = parameter.partition_dim, groups.dims.tp, groups.tp_rank  # type: ignore[attr-defined]

    def piece(piece_name: str, local: tuple[int, ...], row: int) -> Piece:
        full = tuple(n * tp if i == dim else n for i, n in enumerate(local))
        offset = tuple(rank * n if i == dim else 0 for i, n in enumerate(local))
        return Piece(piece_name, full, offset, local, row)

    if is_gated(name):
        half = (shape[0] // 2, *shape[1:])
        stem = logical.removesuffix(".weight")
        return (piece(f"{stem}.gate.weight", half, 0), piece(f"{stem}.up.weight", half, half[0]))
    return (piece(logical, shape, 0),)


def logical_name(chunk: nn.Module, name: str) -> str:
    """A parameter's or module's name in the unsharded model, from its name in this chunk."""
    logical = _LAYER.sub(lambda m: f"backbone.layers.{_global_layer(chunk, int(m.group(1)))}.", name)
    return logical.replace("backbone.block.", "backbone.")


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 empties the tensor and keeps its shape


def _global_layer(chunk: nn.Module, local: int) -> int:
    return chunk.backbone.block.layers[local].layer_number - 1  # type: ignore[union-attr,index]


def _mark_tensor_parallel(chunk: nn.Module) -> None:
    """Set the attributes that megatron-core sets while initialising weights, which we do ourselves.

    DeepSpeed reads `tensor_model_parallel` too: a parameter without it counts once over TP in the gradient norm.
    """
    from megatron.core.tensor_parallel.layers import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        set_tensor_model_parallel_attributes,
    )

    for module in chunk.modules():
        by_row = isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding))
        dim = 0 if by_row else 1 if isinstance(module, RowParallelLinear) else None
        if dim is not None and not hasattr(module.weight, "partition_dim"):
            set_tensor_model_parallel_attributes(module.weight, True, dim, 1)
