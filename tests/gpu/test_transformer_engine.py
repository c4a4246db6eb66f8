"""precision/te.py against Transformer Engine itself; skipped where it is not installed.

What asks for no kernel runs without a GPU too: there the package is told that it has a Hopper, and its states are made
on the CPU. tests/unit/test_transformer_engine.py says the same of a stand-in, for everywhere else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_bit.bench.measuring import relative_error
from megatron_bit.config import Config, load_config
from megatron_bit.model.build import build_model
from megatron_bit.model.layers import PARTIAL
from megatron_bit.parallel import groups as parallel_groups
from megatron_bit.parallel.groups import Groups
from megatron_bit.parallel.logical import pieces
from megatron_bit.precision import te
from megatron_bit.precision.build import build_linears
from megatron_bit.precision.emulated import GRADIENT, INPUT, WEIGHT, Quantizer
from megatron_bit.precision.linears import Scaling, restore_scaling, scaled_layers

if importlib.util.find_spec("transformer_engine") is None:
    pytest.skip("Transformer Engine is not installed", allow_module_level=True)

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
HISTORY = 3
SIZES = [
    "model.bits=9", "model.hidden_size=64", "model.num_heads=4", "model.num_kv_heads=2", "model.num_layers=2",
    "model.ffn_hidden_size=96", "model.head.hidden_size=64", "model.head.ffn_hidden_size=32", "data.seq_length=32",
]  # fmt: skip
DELAYED = ["fp8.recipe=delayed", f"fp8.amax_history={HISTORY}"]


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    yield parallel_groups.init(load_config(preset="laptop"))
    parallel_groups.shutdown()


@pytest.fixture
def package(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """transformer_engine.pytorch.quantization, fit for this machine. After the groups, which look for a GPU."""
    quantization = te._part("pytorch.quantization")
    supports = [getattr(quantization, f"check_{name}_support") for name in ("fp8", "fp8_block_scaling", "mxfp8")]
    if not ON_GPU:
        create = quantization.RecipeState.create
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(quantization, "get_device_compute_capability", lambda: (9, 0))
        monkeypatch.setattr(quantization, "check_nvfp4_support", lambda: (False, "needs 10.0"))
        monkeypatch.setattr(
            quantization.RecipeState, "create", staticmethod(lambda *a, **how: create(*a, **{**how, "device": DEVICE}))
        )
        torch.compiler.set_stance("force_eager")  # it asks for the device
    quantization.FP8GlobalStateManager.reset()
    yield quantization
    torch.compiler.set_stance("default")
    quantization.FP8GlobalStateManager.reset()
    for support in supports:
        support.cache_clear()


def _config(*settings: str) -> Config:
    return load_config(preset="laptop", overrides=[*SIZES, *settings])


def _linears(recipe: str, groups: Groups) -> te.TransformerEngineLinears:
    settings = DELAYED if recipe == "delayed" else [f"fp8.recipe={recipe}"]
    linears = build_linears(_config("train.precision=fp8", *settings), groups)
    assert isinstance(linears, te.TransformerEngineLinears)
    return linears


def _layer(linears: te.TransformerEngineLinears) -> Any:
    return linears.replicated(64, 32, True, torch.bfloat16, DEVICE)


def test_megatron_core_finds_it(package: Any) -> None:
    from megatron.core.extensions import transformer_engine as extension
    from megatron.core.utils import get_te_version, is_te_min_version

    assert extension.HAVE_TE and is_te_min_version("2.9.0") and str(get_te_version()) < "2.12"


def test_what_a_hopper_offers(package: Any) -> None:
    if ON_GPU and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("another GPU")
    found = te.offered()
    assert [name for name, why in found.items() if not why] == ["current", "delayed", "block"]
    assert "10.0" in found["mxfp8"] and "10.0" in found["nvfp4"]


@pytest.mark.parametrize("name", ["current", "delayed", "block", "mxfp8"])
def test_recipes_are_those_that_are_emulated(name: str, package: Any) -> None:
    recipe, mine = te._recipe(name, 7), Quantizer(name, 7, torch.device("cpu"))
    for role, forward in ((INPUT, True), (WEIGHT, True), (GRADIENT, False)):
        assert package.get_fp8_torch_dtype(recipe, forward) == mine.dtypes[role]
    states = {
        mode: package.RecipeState.create(recipe, mode=mode, num_quantizers=count)
        for mode, count in (("forward", 3), ("backward", 2))  # as a linear layer does
    }
    if name == "delayed":
        assert (recipe.margin, recipe.amax_compute_algo, recipe.reduce_amax) == (0, "max", True)
        assert states["forward"].amax_history.shape == (7, 3) and states["forward"].scale.tolist() == [1, 1, 1]
    if name == "current":
        assert not recipe.fp8_quant_fwd_inp.power_2_scale and recipe.fp8_quant_fwd_inp.amax_epsilon == 0
    if name == "block":
        assert (recipe.x_block_scaling_dim, recipe.w_block_scaling_dim, recipe.grad_block_scaling_dim) == (1, 2, 1)
        assert recipe.fp8_quant_fwd_inp.power_2_scale and recipe.fp8_quant_bwd_grad.power_2_scale
        assert states["forward"].make_quantizers()[0].block_len == mine.block
    assert len(states["backward"].make_quantizers()) == 2


def test_nvfp4_is_a_recipe() -> None:
    assert te._recipe("nvfp4", 1).nvfp4()


def test_a_replicated_layer_says_that_it_is(package: Any, groups: Groups) -> None:
    layer = _layer(_linears("current", groups))
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {"weight": (32, 64), "bias": (32,)}
    assert not any(p.tensor_model_parallel for p in layer.parameters())  # or the gradient norm counts it for each rank


@pytest.mark.parametrize("head", ["chain", "diffusion", "softmax"])
def test_the_model_has_the_same_logical_parameters(head: str, package: Any, groups: Groups) -> None:
    settings = [f"model.head.kind={head}"]
    settings += {"diffusion": ["model.group_bits=1"], "softmax": ["model.block_size=1"]}.get(head, [])
    vocabulary = 2**9
    (plain,) = build_model(_config("train.precision=bf16", *settings), vocabulary, groups, eos_id=2)
    (real,) = build_model(_config("train.precision=fp8", *settings), vocabulary, groups, eos_id=2)
    assert pieces(real, groups) == pieces(plain, groups)
    for (name, mine), theirs in zip(plain.named_parameters(), real.parameters(), strict=True):
        assert _marks(theirs) == _marks(mine), name
        assert torch.equal(mine, theirs), name  # drawn by name
    engine = te._part("pytorch").Linear
    (emulated,) = build_model(_config("train.precision=fp8_emulated", *settings), vocabulary, groups, eos_id=2)
    mine = {name for name, layer in emulated.named_modules() if hasattr(layer, "quantizer")}
    assert {name for name, layer in real.named_modules() if isinstance(layer, engine)} == mine and mine


def _marks(parameter: nn.Parameter) -> tuple[Any, ...]:
    """How a parameter is split over TP, and whether its gradient is a partial sum."""
    split = getattr(parameter, "tensor_model_parallel", False)
    return split, getattr(parameter, "partition_dim", None) if split else None, getattr(parameter, PARTIAL, False)


def test_the_state_goes_to_a_checkpoint_and_back(package: Any, groups: Groups) -> None:
    (real,) = build_model(_config("train.precision=fp8", *DELAYED), 2**9, groups, eos_id=2)
    (emulated,) = build_model(_config("train.precision=fp8_emulated", *DELAYED), 2**9, groups, eos_id=2)
    wanted = {}
    for name, _, state in scaled_layers([emulated]):
        wanted[name] = Scaling(torch.rand_like(state.amax_history), torch.rand_like(state.scale))
    assert restore_scaling([real], lambda name: wanted.get(name)) == 0
    found = {name: state for name, _, state in scaled_layers([real])}
    assert found.keys() == wanted.keys()
    for name, state in found.items():
        assert all(torch.equal(a.cpu(), b) for a, b in zip(state, wanted[name], strict=True)), name


def _run(layer: Any, package: Any, amax: Tensor) -> None:
    """What a layer does in a step but for its products: registers its state, and notes its largest values."""
    layer.init_fp8_metadata()
    if not layer.fp8:
        return
    package.FP8GlobalStateManager.add_fp8_tensors_to_global_buffer(layer.fp8_meta)
    layer.fp8_meta["scaling_fwd"].amax_history[0, :2] = amax[:2]
    layer.fp8_meta["scaling_bwd"].amax_history[0, 0] = amax[2]


@pytest.mark.parametrize("fused", [True, False])
def test_delayed_scaling_is_updated_as_emulated(
    fused: bool, package: Any, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step for step, with a tensor of zeros, an overflow, and validation in between."""
    if fused and not ON_GPU:
        pytest.skip("the fused update is a kernel")
    monkeypatch.setenv("NVTE_UNFUSED_FP8_UPDATE", str(int(not fused)))
    linears = _linears("delayed", groups)
    layer, mine = _layer(linears), Quantizer("delayed", HISTORY, torch.device("cpu"))
    assert mine.state is not None
    steps = [[1.5, 0.1, 1e-3], [0.0, 0.3, 2.0], [0.5, float("inf"), 1e-9], [9.0, 0.2, 0.0], [0.1, 0.2, 0.3]]
    for amax in map(torch.tensor, steps):
        with linears.step([layer]):
            _run(layer, package, amax)
        _run(layer, package, amax)  # validation: outside of a step
        mine.update(amax)
        state = linears.scaling(layer)
        assert state is not None
        assert torch.equal(state.amax_history.cpu(), mine.state.amax_history), amax
        torch.testing.assert_close(state.scale.cpu(), mine.state.scale, rtol=1e-6, atol=0)
    assert mine.state.scale.tolist() != [1, 1, 1]


def test_a_step_updates_once_and_an_error_never(package: Any, groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, calls = package.FP8GlobalStateManager, []
    monkeypatch.setattr(manager, "reduce_and_update_fp8_tensors", lambda forward: calls.append(forward))
    linears = _linears("delayed", groups)
    layer = _layer(linears)
    with linears.step([layer]):
        assert manager.is_fp8_enabled() and manager.get_fp8_recipe().amax_history_len == HISTORY
        assert manager.is_first_fp8_module() is False  # so that no layer's backward pass reduces
        assert calls == []
    assert calls == [True, False] and not manager.is_fp8_enabled()
    with pytest.raises(RuntimeError, match="lost"), linears.step([layer]):
        raise RuntimeError("lost")
    assert calls == [True, False] and not manager.is_fp8_enabled() and torch.is_grad_enabled()


def test_fresh_weights_in_every_step(package: Any, groups: Groups) -> None:
    (model,) = build_model(_config("train.precision=fp8"), 2**9, groups, eos_id=2)
    wrapped = [layer for layer in model.modules() if hasattr(layer, "is_first_microbatch")]
    assert len(wrapped) == sum(isinstance(layer, (_column(), _row())) for layer in model.modules()) > 0
    for layer in wrapped:
        layer.is_first_microbatch = False
    with _linears("current", groups).step([model]):
        assert all(layer.is_first_microbatch for layer in wrapped)


def _column() -> type[nn.Module]:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    return TEColumnParallelLinear


def _row() -> type[nn.Module]:
    from megatron.core.extensions.transformer_engine import TERowParallelLinear

    return TERowParallelLinear


def test_the_peer_of_the_benchmark_can_be_built(package: Any, groups: Groups) -> None:
    from megatron_bit.bench.gpt_peer import GPTPeer

    config = _config("train.precision=fp8", "model.head.kind=softmax", "model.block_size=1", "model.vocab_size=512")
    peer = GPTPeer(config, groups)
    names = {type(module).__name__ for module in peer.modules()}
    assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"} <= names


@needs_gpu
def test_largest_values_are_gathered_over_micro_batches(package: Any, groups: Groups) -> None:
    linears = _linears("delayed", groups)
    layer = _layer(linears)
    with linears.step([layer]):
        for size in (3.0, 1.0):
            x = torch.full((16, 64), size, device=DEVICE, dtype=torch.bfloat16)
            layer(x).backward(torch.full((16, 32), size / 4, device=DEVICE, dtype=torch.bfloat16))
    state = linears.scaling(layer)
    assert state is not None
    newest = state.amax_history[-1].tolist()
    assert newest[0] == 3.0 and newest[1] == pytest.approx(layer.weight.abs().max().item()) and newest[2] == 0.75
    assert state.amax_history[0].tolist() == [0, 0, 0]


@needs_gpu
@pytest.mark.parametrize("recipe", ["current", "delayed", "block"])
def test_a_step_uses_the_weights_of_now(recipe: str, package: Any, groups: Groups) -> None:
    """And validation in between is in bf16."""
    from megatron_bit.model import layers

    config = load_config(
        preset="laptop",
        overrides=["train.precision=fp8", f"fp8.recipe={recipe}", "fp8.amax_history=1", "model.hidden_size=256",
                   "model.ffn_hidden_size=256", "model.head.hidden_size=256", "model.head.ffn_hidden_size=256"],
    )  # fmt: skip
    from megatron_bit.model.backbone import transformer_config

    mcore = transformer_config(config, groups)
    linears = mcore.linears
    column: Any = layers.column(mcore, groups.collection.tp, 256, 256)
    torch.manual_seed(0)
    with torch.no_grad():
        column.weight.copy_(torch.randn(256, 256) * 0.05)
    x = torch.randn(128, 1, 256, device=DEVICE, dtype=torch.bfloat16)

    def out() -> Tensor:
        with linears.step([column]):
            return column(x)[0].detach()

    first = [out() for _ in range(2)][-1]  # delayed scaling has its scale in the second step
    exact = (x @ column.weight.t()).detach()
    assert 1e-3 < relative_error(first, exact) < 0.06
    with torch.no_grad():
        assert relative_error(column(x)[0], exact) < 1e-2
        column.weight.neg_()
    assert relative_error(out(), -exact) < 0.06
