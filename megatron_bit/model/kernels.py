"""The forms of the hot operations that a run uses (`train.kernels`), bound once: a call costs what the form costs.

Everything that uses one takes it from `mcore.kernels`, so that no other file asks for the device.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from mbit_kernels import choice, cross_entropy, decode, matched_filter, rms_norm
from mbit_kernels.choice import Form
from torch import Tensor

from megatron_bit.config import Config
from megatron_bit.diffusion import noised
from megatron_bit.errors import UserError
from megatron_bit.parallel.agree import on_every_rank, on_rank0
from megatron_bit.parallel.groups import Groups


@dataclass(frozen=True)
class Kernels:
    """The operations; signatures are the plain forms'."""

    modulated_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor] = rms_norm.modulated_rms_norm
    bit_loss: Callable[..., tuple[Tensor, Tensor]] = matched_filter.bit_loss
    group_cross_entropy: Callable[[Tensor, Tensor, Tensor | None], Tensor] = cross_entropy.group_cross_entropy
    noised_bits: Callable[..., tuple[Tensor, Tensor, Tensor | None]] = noised.noised_bits
    nearest_token: Callable[[Tensor, Tensor], Tensor] = decode.nearest_token


PLAIN = Kernels()
OPERATIONS = {  # what is compiled, which is plain but for a backward pass by hand; the module of the kernel
    "modulated_rms_norm": (rms_norm.modulated_rms_norm_reference, "triton_rms_norm"),
    "bit_loss": (matched_filter.bit_loss, "triton_matched_filter"),
    "group_cross_entropy": (cross_entropy.group_cross_entropy, "triton_cross_entropy"),
    "noised_bits": (noised.noised_bits, "triton_noised_bits"),
    "nearest_token": (decode.nearest_token, "triton_decode"),
}


def build_kernels(config: Config, groups: Groups) -> Kernels:
    """For `train.kernels`, as rank 0's device has it; UserError on every rank if one cannot run them."""
    forms = on_rank0(
        lambda: choice.chosen(
            tuple(OPERATIONS), device_name(groups.device), config.train.kernels, choice.measurements()
        )
    )
    return on_every_rank(lambda: bind(forms, groups.device))


def bind(forms: Mapping[str, Form], device: torch.device) -> Kernels:
    """The functions of these forms; UserError if one cannot run on the device."""
    for form in sorted(set(forms.values())):
        reason = missing(form, device)
        if reason:
            raise UserError(f"train.kernels {form} is not possible here: {reason}; use train.kernels=plain")
    return Kernels(**{name: function(name, form) for name, form in forms.items()})


def function(operation: str, form: Form) -> Callable[..., Any]:
    """One operation in one form. Triton is imported here, and nowhere before."""
    plain, module = OPERATIONS[operation]
    if form == "compiled":
        return torch.compile(plain)
    if form == "triton":
        return getattr(import_module(f"mbit_kernels.{module}"), operation)
    return getattr(PLAIN, operation)


def reference(operation: str) -> Callable[..., Any]:
    """The plain form in operations that autograd knows, which computes float64 in float64."""
    return OPERATIONS[operation][0]


def missing(form: Form, device: torch.device) -> str | None:
    """Why a form cannot run on a device; None if it can."""
    triton = importlib.util.find_spec("triton") is not None
    if form == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs an NVIDIA GPU, and there is none"
    if (form == "triton" or (form == "compiled" and device.type == "cuda")) and not triton:
        return "the package triton is not installed"
    if form == "compiled" and device.type == "cpu" and not _compiler():
        return "torch.compile needs a C++ compiler on a CPU, and there is none on PATH"
    return None


@functools.cache
def _compiler() -> bool:
    return any(name and shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++"))


def device_name(device: torch.device) -> str:
    """What measured.json calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
