"""SwiGLU on a fused projection: keeps only its input, and writes both gradients where the projection wants them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 F] (gate, up) to silu(gate) * up, [..., F]."""
    return _SwiGLU.apply(x)  # type: ignore[no-any-return]


def swiglu_reference(x: Tensor) -> Tensor:
    """The same in plain operations; autograd keeps silu(gate) as well and joins the two gradients by a copy."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(grads[0], F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=d_gate)
        return out
