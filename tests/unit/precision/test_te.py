"""What is asked of Transformer Engine, of a stand-in, as CI has no GPU. It says nothing of the package itself."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from megatron_bit.config import load_config
from megatron_bit.errors import UserError
from megatron_bit.precision import te
from megatron_bit.precision.linears import Scaling


class Layer(nn.Module):
    """As te.Linear holds its state: three tensors forward, two backward."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {}
        self.is_first_microbatch = False

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        for key, columns in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            state = types.SimpleNamespace(
                scale=torch.ones(columns * self.fp8_meta["num_gemms"]), amax_history=torch.zeros(4, columns)
            )
            self.fp8_meta[key] = state


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the stand-in was asked, in order."""
    import megatron.core.tensor_parallel.layers  # noqa: F401  # before the stand-in: it looks for the package

    calls: list[str] = []

    @contextlib.contextmanager
    def autocast(enabled: bool, recipe: Any, amax_reduction_group: Any) -> Iterator[None]:
        calls.append(f"enter {recipe.name} {amax_reduction_group}")
        yield
        calls.append("exit")

    def recipe(name: str) -> Any:
        return lambda **how: types.SimpleNamespace(name=name, delayed=lambda: name == "delayed", **how)

    manager = types.SimpleNamespace(
        is_first_fp8_module=lambda: calls.append("first taken"),
        reduce_and_update_fp8_tensors=lambda forward: calls.append(f"update forward={forward}"),
    )
    able = {f"is_{name}_available": lambda return_reason: (True, "") for name in ("fp8", "fp8_block_scaling")}
    able |= {f"is_{name}_available": lambda return_reason: (False, "needs 10.0") for name in ("mxfp8", "nvfp4")}
    modules = {
        "transformer_engine": types.ModuleType("transformer_engine"),
        "transformer_engine.pytorch": types.SimpleNamespace(autocast=autocast, **able),
        "transformer_engine.pytorch.quantization": types.SimpleNamespace(FP8GlobalStateManager=manager),
        "megatron.core.extensions.transformer_engine": types.SimpleNamespace(
            TEColumnParallelLinear=Layer, TERowParallelLinear=Layer
        ),
        "transformer_engine.common": types.ModuleType("transformer_engine.common"),
        "transformer_engine.common.recipe": types.SimpleNamespace(
            DelayedScaling=recipe("delayed"), Float8CurrentScaling=recipe("current"),
            Float8BlockScaling=recipe("block"), MXFP8BlockScaling=recipe("mxfp8"), NVFP4BlockScaling=recipe("nvfp4"),
        ),
    }  # fmt: skip
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def _linears(*settings: str) -> te.TransformerEngineLinears:
    group: Any = "TPxDP"
    return te.TransformerEngineLinears(load_config(None, ["train.precision=fp8", *settings]), group)


def test_a_step_updates_once_and_with_fresh_weights(said: list[str]) -> None:
    layers = nn.Sequential(Layer(), nn.Linear(2, 2), Layer())
    with _linears("fp8.recipe=delayed").step([layers]):
        said.append("work")
    assert said == ["enter delayed TPxDP", "first taken", "work", "exit", "update forward=False"]
    assert layers[0].is_first_microbatch and layers[2].is_first_microbatch


def test_an_error_in_a_step_asks_for_no_collective(said: list[str]) -> None:
    with pytest.raises(RuntimeError, match="lost"), _linears().step([]):
        raise RuntimeError("lost")
    assert said == ["enter current TPxDP", "first taken"]


def test_scaling_goes_out_and_in(said: list[str]) -> None:
    linears = _linears("fp8.recipe=delayed", "fp8.amax_history=4")
    layer = Layer()
    state = Scaling(torch.arange(12.0).view(4, 3), torch.tensor([2.0, 3.0, 5.0]))
    linears.restore(layer, state)
    assert layer.fp8_meta["scaling_fwd"].scale.tolist() == [2.0, 3.0, 1.0]
    assert layer.fp8_meta["scaling_bwd"].scale.tolist() == [5.0, 1.0]
    assert layer.fp8_meta["scaling_bwd"].amax_history[:, 0].tolist() == [2.0, 5.0, 8.0, 11.0]
    got = linears.scaling(layer)
    assert got is not None and all(torch.equal(a, b) for a, b in zip(got, state, strict=True))
    assert linears.scaling(nn.Linear(2, 2)) is None
    assert _linears("fp8.recipe=block").scaling(layer) is None


def test_recipes_that_the_device_lacks(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    te.require("block")
    with pytest.raises(UserError, match=r"fp8.recipe mxfp8 is not possible here: needs 10.0; use train.precision=bf16"):
        te.require("mxfp8")


def test_without_a_gpu_or_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="needs an NVIDIA GPU, and there is none here"):
        te.require("current")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="Transformer Engine cannot be imported"):
        te.require("current")
