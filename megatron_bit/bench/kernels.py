"""All forms of the hot operations on this device, at the presets' sizes: right first, then how long.

`scripts/gpu_check.py --only kernels` runs it. What it writes is what mbit_kernels/measured.json takes.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mbit_kernels import choice
from torch import Tensor

from megatron_bit.bench.measuring import milliseconds, relative_error
from megatron_bit.config import ModelConfig, load_config
from megatron_bit.diffusion.bit_groups import BitGroups
from megatron_bit.diffusion.philox import seed_key
from megatron_bit.model.kernels import device_name, function, missing, reference

Row = dict[str, Any]
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative error to float64 of outputs and gradients, as norms
SAMPLES = 4  # noise samples a token


class Case(NamedTuple):
    """One operation at one size."""

    operation: str
    size: str
    arguments: tuple[Any, ...]
    gradients: tuple[int, ...]  # arguments that get one
    compared: Callable[[Any], Tensor] = lambda out: out  # what is compared of the output, and has the gradient


def measure(device: torch.device) -> list[Row]:
    """A row for every operation and size: error of every form, milliseconds forward and backward, and the ratio."""
    rows = [_measured(case, device) for case in cases(device)]
    table = _table(rows, device)[device_name(device)]
    return [{**row, "winner": table[row["operation"]]["winner"]} for row in rows]


def write(rows: list[Row], device: torch.device, path: Path) -> None:
    """The rows as a table to copy over mbit_kernels/measured.json; what that has of other devices stays."""
    table = {**choice.measurements(), **_table(rows, device)}
    table[device_name(device)]["versions"] = {name: _version(name) for name in ("torch", "triton")}
    path.write_text(json.dumps(table, indent=1) + "\n")


def _table(rows: list[Row], device: torch.device) -> dict[str, Any]:
    found = [{**row, "times": _times(row)} for row in rows]
    return choice.as_table(device_name(device), found)


def _times(row: Row) -> dict[str, float]:
    """Of the forms that ran and were right."""
    return {form: row[f"{form}, ms"] for form in choice.FORMS if isinstance(row[f"{form}, ms"], float)}


def cases(device: torch.device) -> Iterator[Case]:
    """Every operation at the sizes of presets, one after another, so that one is in memory; on a CPU small ones."""
    on_gpu = device.type == "cuda"
    tokens, dtype = (16384, torch.bfloat16) if on_gpu else (64, torch.float32)
    for preset in ("125m", "8b") if on_gpu else ("125m",):
        model = load_config(preset=preset).model
        torch.manual_seed(0)
        with torch.device(device):
            yield _norm(model, tokens, dtype)
            yield from _bit_loss(model, tokens, dtype)
            yield _cross_entropy(model, tokens, dtype)
            yield _noised_bits(model, tokens, dtype)
            yield _decode(model, tokens // 16)


def _norm(m: ModelConfig, tokens: int, dtype: torch.dtype) -> Case:
    width = m.head.hidden_size
    modulation = torch.randn(tokens, SAMPLES, 6 * width, dtype=dtype).chunk(6, dim=-1)
    x = torch.randn(tokens, SAMPLES, width, dtype=dtype)
    size = f"{tokens} x {SAMPLES}, width {width}"
    return Case("modulated_rms_norm", size, (x, *modulation[:2], 1e-6), (0, 1, 2))


def _bit_loss(m: ModelConfig, tokens: int, dtype: torch.dtype) -> Iterator[Case]:
    log_sigma = torch.randn(tokens, 1, SAMPLES)
    x = torch.randn(tokens, 1, 1, m.bits).sign().to(torch.int8)
    z = x + log_sigma.exp()[..., None] * torch.randn(tokens, 1, SAMPLES, m.bits)
    residual = torch.randn(tokens, 1, SAMPLES, m.bits, dtype=dtype)
    for kind in ("mse", "bce"):
        size = f"{tokens} x {SAMPLES}, {m.bits} bits, {kind}"
        yield Case("bit_loss", size, (residual, z, x, log_sigma, kind, True), (0,), lambda out: out[0])


def _cross_entropy(m: ModelConfig, tokens: int, dtype: torch.dtype) -> Case:
    groups = BitGroups(m.group_sizes)
    product = torch.randn(groups.count, tokens, 1, groups.values, dtype=dtype)  # groups first, as the head's leaves it
    index = groups.index(torch.randn(tokens, 1, m.bits))
    size = f"{tokens} x {groups.count}, {groups.values} values"
    arguments = (3 * product.permute(1, 2, 0, 3), index, groups.invalid if groups.uneven else None)
    return Case("group_cross_entropy", size, arguments, (0,))


def _noised_bits(m: ModelConfig, tokens: int, dtype: torch.dtype) -> Case:
    table = torch.randn(2**m.bits, m.bits).sign().to(torch.int8)
    ids, log_sigma = torch.randint(2**m.bits, (tokens, 1)), torch.randn(tokens // m.block_size, 1, SAMPLES)
    weight = torch.randn(m.head.hidden_size, m.bits, dtype=dtype)
    arguments = (ids, table, log_sigma, torch.tensor([5]), weight, seed_key(1234), 3, m.block_size)
    size = f"{tokens} x {SAMPLES}, {m.bits} bits to {m.head.hidden_size}"
    return Case("noised_bits", size, arguments, (4,), lambda out: out[2])


def _decode(m: ModelConfig, rows: int) -> Case:
    table, logits = torch.randn(2**m.bits, m.bits).sign().to(torch.int8), torch.randn(rows, m.bits)

    def score(tokens: Tensor) -> Tensor:  # two tokens may be equally near but for rounding
        return (logits.double() * table[tokens]).sum(-1)

    return Case("nearest_token", f"{rows} x {2**m.bits} codes", (logits, table), (), score)


def _measured(case: Case, device: torch.device) -> Row:
    row: Row = {"operation": case.operation, "size": case.size, "right": True}
    wanted = _compared(case, reference(case.operation), torch.float64)
    dtype = next((case.arguments[i].dtype for i in case.gradients), torch.float32)
    for form in choice.FORMS:
        reason = missing(form, device)
        if reason:
            row[f"{form}, ms"] = reason
            continue
        torch._dynamo.reset()  # compile for this size, as a run does for its own
        operation = function(case.operation, form)
        got, again = (_compared(case, operation) for _ in range(2))
        row[f"{form}, error"] = max(relative_error(a, b) for a, b in zip(got, wanted, strict=True))
        if not all(torch.equal(a, b) for a, b in zip(got, again, strict=True)):
            row["right"], row[f"{form}, ms"] = False, "differs between two calls"
        elif not row[f"{form}, error"] < LIMIT[dtype]:
            row["right"], row[f"{form}, ms"] = False, "wrong"
        elif form == "triton" and device.type == "cpu":
            row[f"{form}, ms"] = "right; the interpreter's time says nothing"
        else:
            row[f"{form}, ms"] = milliseconds(_prepared(case, operation), device)
    times = _times(row)
    if {"compiled", "triton"} <= times.keys():
        row["compiled over triton"] = times["compiled"] / times["triton"]
    return row


def _compared(case: Case, operation: Callable[..., Any], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and gradients, computed in `dtype` if there is one."""
    arguments = list(case.arguments)
    for i, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and argument.is_floating_point():
            arguments[i] = argument.detach().to(dtype or argument.dtype).requires_grad_(i in case.gradients)
    out = case.compared(operation(*arguments))
    if not case.gradients:
        return [out]
    learned = [arguments[i] for i in case.gradients]
    upstream = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, learned, upstream)]


def _prepared(case: Case, operation: Callable[..., Any]) -> Callable[[], None]:
    """Forward and backward with nothing around them."""
    arguments = list(case.arguments)
    for i in case.gradients:
        arguments[i] = arguments[i].detach().requires_grad_()
    learned = [arguments[i] for i in case.gradients]
    upstream = torch.ones_like(case.compared(operation(*arguments))) if learned else None

    def call() -> None:
        out = operation(*arguments)
        if learned:
            torch.autograd.grad(case.compared(out), learned, upstream)

    return call


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
