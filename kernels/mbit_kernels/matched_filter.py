"""The matched filter and its loss, elementwise over bits: the plain reference of what a fused kernel computes.

Bits are -1 or +1, z = x + sigma * eps. The exact posterior log-odds of an isolated bit under Gaussian noise
are 2 z / sigma^2; the network adds what context and the other bits tell (CoBit, arXiv 2605.07013).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP = 30.0  # |log-odds| beyond this no float32 probability can tell apart


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 to float32; float64 stays, for what is compared with it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def posterior_logits(residual: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
    """residual + clip(2 z / sigma^2, +-30), at least float32; sigma broadcasts."""
    return at_least_float32(residual) + (2.0 * z / (sigma * sigma)).clamp(-CLIP, CLIP)


def squared_error(logits: Tensor, x: Tensor) -> Tensor:
    """(x - tanh(logits / 2))^2 for x in {-1, +1}, as 4 sigmoid(-x logits)^2: no cancellation where it is tiny."""
    return 4.0 * torch.sigmoid(-x * logits).square()


def cross_entropy(logits: Tensor, x: Tensor) -> Tensor:
    """-ln p(x) of every bit, nats."""
    return F.softplus(-x * logits)


def edm_weight(sigma: Tensor) -> Tensor:
    """(sigma^2 + 1) / sigma^2, which is EDM's (sigma01^2 + 1/4) / (sigma01^2 / 4) on squared errors of {0, 1} bits."""
    return 1.0 + 1.0 / (sigma * sigma)


def bit_loss(
    residual: Tensor, z: Tensor, x: Tensor, log_sigma: Tensor, kind: Literal["mse", "bce"], matched: bool
) -> tuple[Tensor, Tensor]:
    """Loss of bits decided one by one.

    Args:
        residual: [s, b, M, B], the head's outputs.
        z: float32 [s, b, M, B], the noisy bits.
        x: [s, b, 1, B] of -1 and +1, any dtype.
        log_sigma: float32 [s, b, M].
        kind: squared error with the EDM weight, or cross-entropy; the mean over bits.
        matched: whether the matched filter is added to the residual.

    Returns:
        float32 [s, b, M] each: the loss, and the squared error summed over bits, without a gradient.
    """
    sigma = log_sigma.exp()[..., None]
    logits = posterior_logits(residual, z, sigma) if matched else at_least_float32(residual)
    error = squared_error(logits, x)
    loss = edm_weight(sigma) * error if kind == "mse" else cross_entropy(logits, x)
    return loss.mean(-1), error.detach().sum(-1)
