"""`train.precision=fp8_emulated`: Transformer Engine's FP8 matrix products in plain torch, on any device.

An operand x becomes q(x s) / s: q rounds to E4M3 or E5M2 after clamping to its largest value (torch 2.11 would give NaN
beyond it), s is the largest value over what `fp8.recipe` says: the tensor, its last steps, or a block. Products are
summed in float32. The rules are those of Transformer Engine 2.11 (common/recipe, pytorch/quantization.py), with one
choice of ours, the same in te.py: delayed scaling is updated once a step, not once a micro-batch, so that it
does not depend on how a batch is cut into micro-batches, and recomputation meets the scales of the first time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from megatron_bit.config import Config
from megatron_bit.parallel.fp8_sizes import BLOCKS
from megatron_bit.precision.linears import LowPrecision, Scaling, linears_of

INPUT, WEIGHT, GRADIENT = range(3)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = torch.finfo(torch.float32).max


def scale_of(amax: Tensor, dtype: torch.dtype, power_of_two: bool = False) -> Tensor:
    """What a tensor with this largest magnitude is multiplied by (float32, same shape); 1 where there is none."""
    scale = (torch.finfo(dtype).max / amax).clamp(max=LARGEST)
    if power_of_two:
        exponent = torch.frexp(scale).exponent
        scale = torch.ldexp(torch.ones_like(scale), exponent - 1)
    return torch.where((amax > 0) & amax.isfinite(), scale, torch.ones_like(scale))


def round_to(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 x, as it is after a way through FP8."""
    limit = torch.finfo(dtype).max
    return (x * scale).clamp(-limit, limit).to(dtype).float() / scale


class Quantizer:
    """Scales and rounds the three tensors of one linear layer."""

    def __init__(self, recipe: str, history: int, device: torch.device) -> None:
        self.block = BLOCKS.get(recipe)
        self.square_weights = recipe == "block"  # blocks of 128 x 128; all else in rows of a block's length
        self.dtypes = (E4M3, E4M3, E4M3 if self.block else E5M2)
        self.state: Scaling | None = None
        if recipe == "delayed":
            self.state = Scaling(torch.zeros(history, 3, device=device), torch.ones(3, device=device))

    def round(self, x: Tensor, role: int, dim: int) -> Tensor:
        """float32 [rows, columns] to the same, rounded for a product that sums over `dim`."""
        dtype = self.dtypes[role]
        if self.state is not None:
            scale = self.state.scale[role]
        elif self.block is None:
            scale = scale_of(x.abs().amax(), dtype)
        else:
            line = (1, self.block) if dim == 1 else (self.block, 1)
            block = (self.block, self.block) if role == WEIGHT and self.square_weights else line
            scale = _of_blocks(x, block, dtype)
        return round_to(x, scale, dtype)

    def note(self, x: Tensor, role: int) -> None:
        """Delayed scaling: remember this step's largest value."""
        if self.state is not None:
            now = self.state.amax_history[0]
            now[role] = torch.maximum(now[role], x.abs().amax())

    def update(self, amax: Tensor) -> None:
        """Delayed scaling, after a step: float32 [3], its largest values over all ranks, enter history and scales."""
        assert self.state is not None
        history, scale = self.state
        history[0] = amax
        most = history.amax(0)
        for role, dtype in enumerate(self.dtypes):
            known = (most[role] > 0) & most[role].isfinite()
            scale[role] = torch.where(known, scale_of(most[role], dtype), scale[role])
        history.copy_(history.roll(-1, 0))
        history[0] = 0.0


def _of_blocks(x: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The scale of every element of [rows, columns], one a block; blocks at the edges may be smaller."""
    (rows, columns), (r, c) = x.shape, block
    padded = F.pad(x.abs(), (0, -columns % c, 0, -rows % r))
    amax = padded.unflatten(0, (-1, r)).unflatten(2, (-1, c)).amax((1, 3))
    scale = scale_of(amax, dtype, power_of_two=True)
    return scale.repeat_interleave(r, 0)[:rows].repeat_interleave(c, 1)[:, :columns]


class _Product(torch.autograd.Function):
    """x [..., I] and weight [O, I] to x weight^T [..., O], each of the three products with operands in FP8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, quantizer: Quantizer) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.quantizer = quantizer
        rows, matrix = x.flatten(0, -2).float(), weight.float()
        quantizer.note(rows, INPUT)
        quantizer.note(matrix, WEIGHT)
        out = quantizer.round(rows, INPUT, 1) @ quantizer.round(matrix, WEIGHT, 1).t()
        return out.to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (x, weight), quantizer = ctx.saved_tensors, ctx.quantizer
        rows, g = x.flatten(0, -2).float(), grad.flatten(0, -2).float()
        quantizer.note(g, GRADIENT)
        by_input = quantizer.round(g, GRADIENT, 1) @ quantizer.round(weight.float(), WEIGHT, 0)
        by_weight = quantizer.round(g, GRADIENT, 0).t() @ quantizer.round(rows, INPUT, 0)
        return by_input.to(x.dtype).view_as(x), by_weight.to(weight.dtype), None


class _InStep:
    """A parallel linear layer of megatron-core, with its product in FP8 inside a training step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.linears: EmulatedLinears = linears_of(self)  # type: ignore[assignment]
        self.quantizer = self.linears.quantizer()

    def _forward_impl(self, input: Tensor, weight: Tensor, **how: Any) -> Tensor:
        if not self.linears.active:
            return super()._forward_impl(input, weight, **how)  # type: ignore[misc]
        if how["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, group=how["tp_group"])
        elif how["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=how["tp_group"])
        return _Product.apply(input, weight, self.quantizer)  # type: ignore[return-value]


class Column(_InStep, ColumnParallelLinear):
    pass


class Row(_InStep, RowParallelLinear):
    pass


class Replicated(nn.Linear):
    """torch's, with its product in FP8 inside a training step."""

    def __init__(self, linears: EmulatedLinears, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.linears, self.quantizer = linears, linears.quantizer()

    def forward(self, input: Tensor) -> Tensor:
        if not self.linears.active:
            return super().forward(input)
        out: Tensor = _Product.apply(input, self.weight, self.quantizer)  # type: ignore[assignment]
        return out if self.bias is None else out + self.bias


class EmulatedLinears(LowPrecision):
    """Layers whose products go through FP8 while a training step is under way; validation is in bf16."""

    def __init__(self, config: Config, group: dist.ProcessGroup, device: torch.device) -> None:
        """group: the ranks that have a part of the same layers, over which largest values are taken."""
        super().__init__(config)
        self.column, self.row = Column, Row
        self.active = False
        self._settings, self._group, self._device = config.fp8, group, device

    def quantizer(self) -> Quantizer:
        return Quantizer(self._settings.recipe, self._settings.amax_history, self._device)

    def replicated(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, device: torch.device) -> nn.Module:
        return Replicated(self, inputs, outputs, bias=bias, dtype=dtype, device=device)

    @contextlib.contextmanager
    def step(self, chunks: Sequence[nn.Module]) -> Iterator[None]:
        self.active = True
        try:
            yield
        finally:
            self.active = False
        quantizers = [q for chunk in chunks for q in map(_delayed, chunk.modules()) if q is not None]
        if quantizers:
            amax = torch.stack([q.state.amax_history[0] for q in quantizers])  # type: ignore[union-attr]
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=self._group)
            for quantizer, largest in zip(quantizers, amax, strict=True):
                quantizer.update(largest)

    def scaling(self, layer: nn.Module) -> Scaling | None:
        quantizer = _delayed(layer)
        return None if quantizer is None else Scaling(*(t.clone() for t in quantizer.state))  # type: ignore[union-attr]

    def restore(self, layer: nn.Module, state: Scaling) -> None:
        quantizer = _delayed(layer)
        assert quantizer is not None and quantizer.state is not None
        for mine, saved in zip(quantizer.state, state, strict=True):
            mine.copy_(saved)


def _delayed(layer: nn.Module) -> Quantizer | None:
    quantizer = getattr(layer, "quantizer", None)
    return quantizer if isinstance(quantizer, Quantizer) and quantizer.state is not None else None
