"""The training loss and the likelihood bound, both from one evaluation of the head."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from megatron_bit.diffusion.noise import Distribution
from megatron_bit.diffusion.posterior import Posterior


class LossTerms(NamedTuple):
    """Per token and noise sample, float32 [s, b, M]."""

    loss: Tensor  # mean over bits of the weighted error
    rate: Tensor  # squared error / sigma^2, summed over bits, detached: the integrand of the bound
    bound: Tensor  # importance-weighted integrand of the likelihood bound, nats per token (its mean is the bound)


def denoising_loss(
    posterior: Posterior,
    residual: Tensor,
    z: Tensor,
    x: Tensor,
    log_sigma: Tensor,
    distribution: Distribution,
    kind: Literal["mse", "bce"],
) -> LossTerms:
    """Matched-filter loss of one noise draw.

    The bound is -ln p(x|h) <= integral E||x - x_hat||^2 / sigma^2 d ln sigma (I-MMSE; MATH.md, "Likelihood bound"),
    estimated here by dividing the integrand by the density the levels were drawn from. The reconstruction term
    at sigma_min is not part of it; validation adds it.

    Args:
        residual: [s, b, M, outputs] of the head.
        z: float32 [s, b, M, B], x + sigma eps.
        x: [s, b, 1, B] clean bits, -1 or +1, any dtype.
        log_sigma: float32 [s, b, M].
    """
    loss, error = posterior.token_loss(residual, z, x, log_sigma, kind)
    variance = log_sigma.exp().square()
    importance = 1.0 / (variance * distribution.density(log_sigma))
    return LossTerms(loss, error / variance, error * importance)
