"""The Triton kernels under its interpreter: against the plain forms in float64, at odd sizes, and in whole models."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import triton_checks
from triton_worker import interpreted

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 64), (1, 2, 129), (40, 1, 100)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    interpreted(triton_checks.check_norm, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["mse", "bce"])
@pytest.mark.parametrize(("bits", "matched", "sliced"), [(13, True, False), (13, False, True), (16, True, True)])
def test_bit_loss(bits: int, matched: bool, sliced: bool, kind: str, dtype: torch.dtype) -> None:
    interpreted(triton_checks.check_bit_loss, bits, dtype, kind, matched, sliced)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "grouped", "swapped", "part", "turned"])
@pytest.mark.parametrize("sizes", [(4, 4), (5, 4, 4), (9,), (1, 1, 1)])
def test_cross_entropy(sizes: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    interpreted(triton_checks.check_cross_entropy, sizes, dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4, 2, 3, 16), (5, 3, 2, 4, 13), (2, 1, 1, 1, 1), (1, 2, 3, 2, 70)])
def test_noised_bits(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    interpreted(triton_checks.check_noised_bits, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "codes"), [(6, 64), (11, 1999), (13, 4500), (17, 2100)])
def test_decode(bits: int, codes: int, dtype: torch.dtype) -> None:
    interpreted(triton_checks.check_decode, bits, codes, dtype)


def test_nothing() -> None:
    interpreted(triton_checks.check_empty)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.head.kind=diffusion", "model.group_bits=1"),
        ("model.head.kind=diffusion", "model.group_bits=1", "diffusion.loss=bce", "diffusion.self_condition=0.5"),
        ("model.head.kind=diffusion", "model.group_bits=1", "parallel.recompute=head"),
        ("model.head.kind=diffusion", "model.group_bits=4", "diffusion.parameterization=direct"),
        ("model.head.kind=chain", "model.group_bits=4"),
        ("model.head.kind=chain", "model.group_bits=4", "parallel.recompute=head"),
    ],
    ids=",".join,
)
def test_training_step(overrides: tuple[str, ...]) -> None:
    interpreted(triton_checks.check_model, *overrides)
