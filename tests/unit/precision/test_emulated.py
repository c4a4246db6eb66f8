"""Emulated FP8 against what Transformer Engine documents, torch's own scaled product, and plain loops."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from torch import Tensor

from megatron_bit.precision.emulated import E4M3, E5M2, GRADIENT, INPUT, WEIGHT, Quantizer, _Product, round_to, scale_of

CPU = torch.device("cpu")
LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("amax", "dtype", "power_of_two", "scale"),
    [
        (2.0, E4M3, False, 224.0),
        (2.0, E5M2, False, 28672.0),
        (3.0, E4M3, True, 128.0),  # 448 / 3 = 149.3
        (3.5, E4M3, True, 128.0),  # exactly
        (0.0, E4M3, False, 1.0),
        (float("inf"), E4M3, False, 1.0),
        (float("nan"), E4M3, True, 1.0),
        (1e-38, E4M3, False, LARGEST),
    ],
)
def test_scale(amax: float, dtype: torch.dtype, power_of_two: bool, scale: float) -> None:
    assert scale_of(torch.tensor(amax), dtype, power_of_two).item() == pytest.approx(scale, rel=1e-6)


def test_beyond_the_range_is_the_largest_value_and_not_nan() -> None:
    x = torch.tensor([1000.0, -1e9, 448.0, 0.3, float("nan")])
    rounded = round_to(x, torch.tensor(1.0), E4M3)
    assert rounded[:3].tolist() == [448.0, -448.0, 448.0]
    assert rounded[3].item() == pytest.approx(0.3, rel=2**-4) and rounded[4].isnan()


@pytest.mark.parametrize("recipe", ["current", "delayed"])
@pytest.mark.parametrize("shape", [(32, 48, 16), (17, 33, 5)])
def test_products_of_whole_tensors(recipe: str, shape: tuple[int, int, int]) -> None:
    """The three products, by hand in float64; the first two steps of a delayed one."""
    rows, inputs, outputs = shape
    quantizer = Quantizer(recipe, 4, CPU)
    scales, seen = [1.0, 1.0, 1.0], torch.zeros(3)
    for step in range(3):
        x, w, g = _operands(rows, inputs, outputs, seed=step)
        out, dx, dw = _products(x, w, g, quantizer)
        if recipe == "current":
            scales = [448 / x.abs().max().item(), 448 / w.abs().max().item(), 57344 / g.abs().max().item()]
        qx, qw, qg = (_plain(t, s, d) for t, s, d in zip((x, w, g), scales, (E4M3, E4M3, E5M2), strict=True))
        torch.testing.assert_close(out.double(), qx @ qw.t(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dx.double(), qg @ qw, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(dw.double(), qg.t() @ qx, rtol=1e-5, atol=1e-8)
        if recipe == "delayed":
            amax = torch.tensor([t.abs().max() for t in (x, w, g)])
            quantizer.update(amax)
            seen = torch.maximum(seen, amax)  # all steps are within the history
            scales = [limit / a for limit, a in zip((448, 448, 57344), seen.tolist(), strict=True)]


def test_current_scaling_is_torchs_own_product_in_fp8() -> None:
    x, w, _ = _operands(32, 64, 48)
    out, _, _ = _products(x, w, torch.zeros(32, 48), Quantizer("current", 1, CPU))
    a, b = scale_of(x.abs().amax(), E4M3), scale_of(w.abs().amax(), E4M3)
    mine = torch._scaled_mm(
        (x * a).clamp(-448, 448).to(E4M3), (w * b).clamp(-448, 448).to(E4M3).t(), 1 / a, 1 / b, out_dtype=torch.float32
    )
    torch.testing.assert_close(out, mine, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["block", "mxfp8"])
def test_blocks(recipe: str) -> None:
    """Every element's scale, by loops; sizes that no block fits. Products sum over the direction of the blocks."""
    x, w, g = _operands(150, 200, 130)
    size = 128 if recipe == "block" else 32
    quantizer = Quantizer(recipe, 1, CPU)
    out, dx, dw = _products(x, w, g, quantizer)

    def along(t: Tensor, dim: int, square: bool = False) -> Tensor:
        high, wide = (size, size) if square else (1, size) if dim == 1 else (size, 1)
        done = torch.empty_like(t, dtype=torch.float64)
        for i in range(0, t.shape[0], high):
            for j in range(0, t.shape[1], wide):
                part = t[i : i + high, j : j + wide]
                scale = 2.0 ** torch.floor(torch.log2(448 / part.abs().max().double())).item()
                done[i : i + high, j : j + wide] = _plain(part, scale, E4M3)
        return done

    square = recipe == "block"
    torch.testing.assert_close(out.double(), along(x, 1) @ along(w, 1, square).t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx.double(), along(g, 1) @ along(w, 0, square), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(dw.double(), along(g, 0).t() @ along(x, 0), rtol=1e-5, atol=1e-8)


def test_history_forgets() -> None:
    """The scale follows the largest of the last `amax_history` steps; what is not finite leaves it as it is."""
    quantizer, seen = Quantizer("delayed", 3, CPU), deque(maxlen=3)
    assert quantizer.state is not None
    for value in (5.0, 1.0, 0.5, 0.25, 0.125, 0.125):
        quantizer.update(torch.full((3,), value))
        # TE clears the row of the step to come, which was the oldest: L rows know L - 1 steps, and the step itself
        seen.append(value)
        assert quantizer.state.scale[INPUT].item() == pytest.approx(448 / max(seen))
        assert quantizer.state.scale[GRADIENT].item() == pytest.approx(57344 / max(seen))
    before = quantizer.state.scale.clone()
    quantizer.update(torch.tensor([float("inf"), 0.0, 0.125]))
    assert quantizer.state.scale[INPUT] == before[INPUT]
    assert quantizer.state.scale[WEIGHT].item() == 448 / 0.125


def test_a_step_notes_the_largest_of_all_micro_batches() -> None:
    quantizer = Quantizer("delayed", 4, CPU)
    assert quantizer.state is not None
    most = torch.zeros(3)
    for seed in range(3):
        x, w, g = _operands(8, 16, 16, seed)
        _products(x, w, g, quantizer)
        most = torch.maximum(most, torch.tensor([t.abs().max() for t in (x, w, g)]))
    assert quantizer.state.amax_history[0].tolist() == most.tolist()
    assert quantizer.state.scale.tolist() == [1.0, 1.0, 1.0]  # until the step has ended


def _operands(rows: int, inputs: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator) * 3
    w = torch.randn(outputs, inputs, generator=generator) * 0.02
    return x, w, torch.randn(rows, outputs, generator=generator) * 1e-3


def _products(x: Tensor, w: Tensor, g: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor, Tensor]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    out: Tensor = _Product.apply(x[:, None], w, quantizer)  # type: ignore[assignment]
    out.backward(g[:, None])
    assert x.grad is not None and w.grad is not None
    return out.detach()[:, 0], x.grad, w.grad


def _plain(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """float64, by a table of all values of the format."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    values = values[values.isfinite()].unique()
    scaled = (x.float() * torch.tensor(scale, dtype=torch.float32)).double()
    right = torch.searchsorted(values, scaled).clamp(1, len(values) - 1)
    low, high = values[right - 1], values[right]
    middle = (low + high) / 2
    nearest = torch.where(scaled > middle, high, low)
    even_high = high.float().to(dtype).view(torch.uint8) % 2 == 0
    nearest = torch.where((scaled == middle) & even_high, high, nearest)
    return torch.where(scaled >= values[-1], values[-1], torch.where(scaled <= values[0], values[0], nearest)) / scale
