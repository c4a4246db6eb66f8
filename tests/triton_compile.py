"""Triton's kernels compiled for a GPU that is not there: what the interpreter does not see (types, registers).

Run by tests/triton_worker.py. A launch stops after the compilation, so outputs are whatever was in memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_bit.config import load_config
from megatron_bit.model.kernels import function

Resources = dict[str, dict[str, int]]  # kernel: REG, STACK, SHARED (bytes), of cuobjdump, and warps


def resources(preset: str, dtype: torch.dtype, capability: int = 90) -> Resources:
    """Forward and backward of every operation at the sizes of a preset."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Nowhere:
        """As much of a driver as a compilation asks for."""

        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    triton.runtime.driver.set_active(Nowhere())
    found: Resources = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        name = f"{self.fn.__module__.removeprefix('mbit_kernels.triton_')}{self.fn.__name__}"
        found[name] = {**_resources(kernel.asm["cubin"]), "warps": kernel.metadata.num_warps}
        return kernel

    JITFunction.run = compile_only
    try:
        _call_all(preset, dtype)
    finally:
        JITFunction.run = run
    return found


def _call_all(preset: str, dtype: torch.dtype) -> None:
    m = load_config(preset=preset).model
    bits, width, samples, tokens, k = m.bits, m.head.hidden_size, 4, 32, m.block_size

    def tensor(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, requires_grad=True)

    x, modulation = tensor(tokens, samples, width), tensor(tokens, samples, 6 * width).chunk(6, dim=-1)
    function("modulated_rms_norm", "triton")(x, *modulation[:2], 1e-6).sum().backward()
    z, levels = torch.zeros(tokens, 1, samples, bits), torch.zeros(tokens, 1, samples)
    for kind in ("mse", "bce"):
        arguments = (tensor(tokens, 1, samples, bits), z, torch.ones(tokens, 1, 1, bits, dtype=torch.int8), levels)
        function("bit_loss", "triton")(*arguments, kind, True)[0].sum().backward()
    sizes = m.group_sizes
    logits, index = tensor(tokens, 1, len(sizes), 2 ** sizes[0]), torch.zeros(tokens, 1, len(sizes), dtype=torch.int64)
    invalid = torch.zeros(len(sizes), 2 ** sizes[0], dtype=torch.bool) if len(set(sizes)) > 1 else None
    function("group_cross_entropy", "triton")(logits, index, invalid).sum().backward()
    table = torch.ones(2**bits, bits, dtype=torch.int8)
    rest = (torch.zeros(1, dtype=torch.int64), tensor(width, bits), (4_000_000_000, 3_000_000_000), 5, k)
    ids = torch.zeros(tokens, 1, dtype=torch.int64)
    function("noised_bits", "triton")(ids, table, levels[: tokens // k], *rest)
    function("nearest_token", "triton")(torch.zeros(tokens, bits), table)


def _resources(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    line = next(line for line in said.stdout.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", line)}
