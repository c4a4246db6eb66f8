"""The only file that knows Transformer Engine: real FP8, for `train.precision=fp8`.

Written against 2.11 (docs/performance.md says what of it has run on a GPU). Three of its habits are answered here:
- Products are in FP8 inside `autocast` alone. One autocast stands around a whole training step, so that the largest
  values of delayed scaling, which its kernels gather by an atomic maximum, are reduced once a step over the ranks that
  share the layers; it would otherwise do so in the backward pass of the first layer and at the end of every forward
  pass. Validation is outside, in bf16, and leaves no trace in the history.
- megatron-core's wrappers keep the rounded weights from one micro-batch to the next until `is_first_microbatch` is set
  again, which megatron-core does for its own models only. Without it training would go on with the weights of step 1.
- Its own checkpoint state is pickled; `scaling` takes the tensors instead.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bit.config import Config
from megatron_bit.errors import UserError
from megatron_bit.precision.linears import LowPrecision, Scaling

_OTHERWISE = "use train.precision=bf16, or fp8_emulated to look at the numerics"
_FORWARD, _BACKWARD = "scaling_fwd", "scaling_bwd"  # [input, weight, output] and [gradient of the output, of the input]


def require(recipe: str) -> None:
    """UserError if this machine cannot train with `fp8.recipe`."""
    if not torch.cuda.is_available():
        raise UserError(f"train.precision fp8 needs an NVIDIA GPU, and there is none here; {_OTHERWISE}")
    reason = offered().get(recipe, "not a recipe")
    if reason:
        raise UserError(f"train.precision fp8 with fp8.recipe {recipe} is not possible here: {reason}; {_OTHERWISE}")


def offered() -> dict[str, str]:
    """Recipe: why this device cannot do it, or an empty string."""
    recipes = ("current", "delayed", "block", "mxfp8", "nvfp4")
    if not torch.cuda.is_available():  # Transformer Engine would fail on asking what device it is
        return dict.fromkeys(recipes, "there is no NVIDIA GPU here")
    try:
        te = _part("pytorch")
    except Exception as error:  # the meta package alone raises RuntimeError
        why = f"Transformer Engine cannot be imported ({' '.join(str(error).split())[:120]})"
        return dict.fromkeys(recipes, why)
    tensor = te.is_fp8_available(return_reason=True)
    found = (
        tensor, tensor, te.is_fp8_block_scaling_available(return_reason=True),
        te.is_mxfp8_available(return_reason=True), te.is_nvfp4_available(return_reason=True),
    )  # fmt: skip
    return {name: "" if able else str(reason) for name, (able, reason) in zip(recipes, found, strict=True)}


def _part(name: str) -> Any:
    """A module of the package. After torch, which loads what it needs."""
    os.environ.setdefault("NVTE_FRAMEWORK", "pytorch")  # or it warns wherever JAX is installed without its JAX part
    return importlib.import_module(f"transformer_engine.{name}")


def _recipe(name: str, amax_history: int) -> Any:
    te = _part("common.recipe")
    if name == "delayed":
        return te.DelayedScaling(amax_history_len=amax_history)
    kinds: dict[str, Any] = {
        "current": te.Float8CurrentScaling, "block": te.Float8BlockScaling,
        "mxfp8": te.MXFP8BlockScaling, "nvfp4": te.NVFP4BlockScaling,
    }  # fmt: skip
    return kinds[name]()


def plain_linear(recipe: str, weight: Tensor) -> tuple[nn.Module, Callable[[], AbstractContextManager[None]]]:
    """A single linear layer with this weight [outputs, inputs], and the context in which it is in FP8: for checks."""
    te = _part("pytorch")
    layer = te.Linear(*reversed(weight.shape), bias=False, params_dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer, lambda: te.autocast(enabled=True, recipe=_recipe(recipe, 1))


class TransformerEngineLinears(LowPrecision):
    """megatron-core's wrappers of Transformer Engine's linear layers."""

    def __init__(self, config: Config, group: dist.ProcessGroup) -> None:
        """group: the ranks that have a part of the same layers, over which largest values are taken."""
        super().__init__(config)
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        self.column, self.row = TEColumnParallelLinear, TERowParallelLinear
        self._recipe, self._group = _recipe(config.fp8.recipe, config.fp8.amax_history), group

    def replicated(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, device: torch.device) -> nn.Module:
        layer: nn.Module = _part("pytorch").Linear(inputs, outputs, bias=bias, params_dtype=dtype, device=device)
        for parameter in layer.parameters():  # the weight says it is split over TP, whatever parallel_mode is
            parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        return layer

    @contextlib.contextmanager
    def step(self, chunks: Sequence[nn.Module]) -> Iterator[None]:
        te, manager = _part("pytorch"), _part("pytorch.quantization").FP8GlobalStateManager
        for chunk in chunks:
            for layer in chunk.modules():
                if hasattr(layer, "is_first_microbatch"):
                    layer.is_first_microbatch = True  # type: ignore[assignment]
        with torch.enable_grad(), te.autocast(enabled=True, recipe=self._recipe, amax_reduction_group=self._group):
            manager.is_first_fp8_module()  # ask in the first layer's place: no reduction in the middle of the step
            try:
                yield
            except BaseException:
                torch.set_grad_enabled(False)  # or autocast waits on its way out for ranks that know of no error
                raise
        manager.reduce_and_update_fp8_tensors(forward=False)  # the forward one was at the end of autocast

    def scaling(self, layer: nn.Module) -> Scaling | None:
        found = self._states(layer)
        if found is None:
            return None
        forward, backward = found
        return Scaling(
            torch.cat((forward.amax_history[:, :2], backward.amax_history[:, :1]), dim=1).clone(),
            torch.cat((forward.scale[:2], backward.scale[:1])).clone(),
        )

    def restore(self, layer: nn.Module, state: Scaling) -> None:
        found = self._states(layer)
        assert found is not None
        forward, backward = found
        forward.amax_history[:, :2].copy_(state.amax_history[:, :2])
        backward.amax_history[:, :1].copy_(state.amax_history[:, 2:])
        forward.scale[:2].copy_(state.scale[:2])
        backward.scale[:1].copy_(state.scale[2:])

    def _states(self, layer: nn.Module) -> tuple[Any, Any] | None:
        """Forward and backward state of a layer under delayed scaling, made now if it has not run yet."""
        meta: Any = getattr(layer, "fp8_meta", None)
        if meta is None or not self._recipe.delayed():
            return None
        if _FORWARD not in meta:
            meta["num_gemms"] = 1
            layer.init_fp8_meta_tensors(self._recipe)  # type: ignore[operator]
        return meta[_FORWARD], meta[_BACKWARD]
