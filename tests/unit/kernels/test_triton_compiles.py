"""The Triton kernels compiled for Hopper, on a machine without a GPU, at the sizes of presets."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import triton_compile
from triton_worker import compiling

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
KERNELS = {
    "rms_norm_forward", "rms_norm_backward", "matched_filter_forward", "matched_filter_backward",
    "cross_entropy_forward", "cross_entropy_backward", "noised_bits_forward", "decode_best",
}  # fmt: skip


@pytest.mark.parametrize(("preset", "dtype"), [("125m", torch.float32), ("8b", torch.bfloat16)])
def test_compiles_without_spilling(preset: str, dtype: torch.dtype) -> None:
    """Registers that do not fit go to the stack, which is memory; the 32 bytes of a sine are no spill."""
    found = compiling(triton_compile.resources, preset, dtype)
    assert set(found) == KERNELS
    for name, used in found.items():
        assert used["STACK"] <= (32 if name == "noised_bits_forward" else 0), (name, used)
        assert used["SHARED"] <= 48 * 1024, (name, used)
