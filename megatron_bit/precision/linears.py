"""What linear layers of a precision are to the rest: megatron-core's here, in FP8 in te.py and emulated.py.

Everything that builds one takes it from `mcore.linears`, so that no other file asks for the precision. FP8 leaves
alone: bits into channels, what makes logits (output and prior, as Megatron leaves its own output layer), the last
modulation, and the few rows that enter once a block or a noise level.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_bit.config import Config
from megatron_bit.parallel.logical import logical_name

FP8 = "fp8"  # the state of a checkpoint's tensors that hold a Scaling


class Scaling(NamedTuple):
    """What delayed scaling knows of one linear layer; the columns are input, weight and gradient of the output."""

    amax_history: Tensor  # float32 [L, 3]: largest values; row 0 is this step's, 1 the oldest, L - 1 the newest
    scale: Tensor  # float32 [3]


class Linears:
    """Full precision: megatron-core's layers."""

    def __init__(self) -> None:
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

        self.column: Any = ColumnParallelLinear  # classes: megatron-core's specs take nothing else
        self.row: Any = RowParallelLinear

    def of_layer(self, number: int) -> Linears:
        """Those of a backbone layer, counted from 0 over the whole model."""
        return self

    def replicated(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The same on every tensor-parallel rank."""
        return nn.Linear(inputs, outputs, bias=bias, dtype=dtype, device=device)

    def step(self, chunks: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Around forward and backward of one training step, on every rank."""
        return contextlib.nullcontext()

    def scaling(self, layer: nn.Module) -> Scaling | None:
        """What a checkpoint has of a layer: copies, or None if it has no state."""
        return None

    def restore(self, layer: nn.Module, state: Scaling) -> None:
        """Give a layer back what `scaling` said of it."""
        raise NotImplementedError


class LowPrecision(Linears):
    """What real and emulated FP8 have in common."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._full = Linears()
        self._first = config.fp8.first_layers_bf16
        self._last = config.model.num_layers - config.fp8.last_layers_bf16

    def of_layer(self, number: int) -> Linears:
        return self if self._first <= number < self._last else self._full


def linears_of(chunk: Any) -> Linears:
    """What a chunk's layers were made of."""
    return chunk.config.linears


def scaled_layers(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module, Scaling]]:
    """(logical name, layer, its state) of every layer of this rank's chunks that has one."""
    for chunk in chunks:
        linears = linears_of(chunk)
        for name, layer in chunk.named_modules():
            state = linears.scaling(layer)
            if state is not None:
                yield logical_name(chunk, name), layer, state


def restore_scaling(chunks: Sequence[nn.Module], read: Callable[[str], Scaling | None]) -> int:
    """Fill every layer's state with what `read` has of its logical name; how many it had nothing of.

    A history of another length gives its newest rows.
    """
    missing = 0
    for chunk in chunks:
        for name, layer, new in scaled_layers([chunk]):
            old = read(name)
            if old is None:
                missing += 1
                continue
            rows = min(len(new.amax_history), len(old.amax_history))
            new.amax_history.zero_()[0] = old.amax_history[0]
            if rows > 1:
                new.amax_history[1 - rows :] = old.amax_history[1 - rows :]
            linears_of(chunk).restore(layer, Scaling(new.amax_history, old.scale))
    return missing
