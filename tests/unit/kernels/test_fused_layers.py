"""Hand-written backward passes of mbit_kernels against autograd through the plain forms, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from mbit_kernels.rms_norm import modulated_rms_norm, modulated_rms_norm_reference, rms_norm
from mbit_kernels.swiglu import swiglu, swiglu_reference
from torch import Tensor

EPS = 1e-3  # large enough for a wrong one to show


def _plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "rms_norm": (lambda x, w: rms_norm(x, w, EPS), _plain_norm, [(3, 5, 7), (7,)]),
    "modulated": (
        lambda x, shift, scale: modulated_rms_norm(x, shift, scale, EPS),
        lambda x, shift, scale: modulated_rms_norm_reference(x, shift, scale, EPS),
        [(3, 5, 7)] * 3,
    ),
    "swiglu": (swiglu, swiglu_reference, [(3, 5, 14)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_autograd(name: str, dtype: torch.dtype) -> None:
    ours, plain, shapes = CASES[name]
    generator = torch.Generator().manual_seed(3)
    given = [(2 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]
    mine = [x.clone().requires_grad_() for x in given]
    exact = [x.double().requires_grad_() for x in given]
    out, expected = ours(*mine), plain(*exact)
    assert out.dtype == dtype
    upstream = torch.randn(out.shape, generator=generator)
    out.backward(upstream.to(dtype))
    expected.backward(upstream.to(dtype).double())
    tolerance = 2e-6 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for got, want in zip(mine, exact, strict=True):
        assert got.grad is not None and want.grad is not None and got.grad.dtype == dtype
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("name", CASES)
def test_views_and_shared_inputs(name: str) -> None:
    """Inputs that are slices of one tensor, as AdaLN's six are: gradients meet in it."""
    ours, plain, shapes = CASES[name]
    if len(set(shapes)) > 1:
        pytest.skip("a weight is no slice of the input")
    generator = torch.Generator().manual_seed(4)
    joint = torch.randn(*shapes[0][:-1], len(shapes) * shapes[0][-1], generator=generator)
    results = []
    for function, x in ((ours, joint.clone()), (plain, joint.double())):
        x.requires_grad_()
        function(*x.chunk(len(shapes), dim=-1)).square().sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-5, atol=1e-5)
