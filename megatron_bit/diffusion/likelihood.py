"""The likelihood bound of whole sequences: what validation reports (MATH.md, "Likelihood bound")."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_bit.diffusion.bit_groups import BitGroups
from megatron_bit.diffusion.noise import (
    RECONSTRUCTION,
    VALIDATION,
    Distribution,
    gaussian,
    stratified_levels,
)
from megatron_bit.diffusion.posterior import Posterior

Head = Callable[[Tensor, Tensor], Tensor]  # (z [s, b, M, B], log_sigma [n, b, M]) -> [s, b, M, outputs]


def token_bound(
    head: Head,
    posterior: Posterior,
    groups: BitGroups,
    x: Tensor,
    sample: Tensor,
    distribution: Distribution,
    *,
    seed: int,
    first_block: int,
    block_size: int,
    noise_samples: int,
) -> Tensor:
    """Each group's share of its block's bound on -ln p(block | context), in nats; unbiased over the noise.

    Only the sum over a block is a bound: the tokens of a block are denoised together, and one may look at another.

    The integral over ln sigma by stratified importance sampling, plus the reconstruction term at sigma_min (how
    well bits are read off when there is almost no noise), plus a bound of what lies above sigma_max: there
    E||x - x_hat||^2 <= B for the optimal denoiser, hence at most B / (2 sigma_max^2).

    Args:
        x: float32 [s, b, 1, B], clean bits.
        sample: int64 [b], indices of the validation samples; the noise is the same at every validation.

    Returns:
        float32 [s, b, G].
    """
    s, bits = x.shape[0], x.shape[-1]
    blocks = s // block_size
    level = stratified_levels(seed, VALIDATION, sample, first_block, blocks, noise_samples)
    log_sigma = distribution.log_sigma(level)
    eps = gaussian(seed, VALIDATION, sample, first_block, blocks, noise_samples, block_size, bits)
    per_token = log_sigma.repeat_interleave(block_size, dim=0)
    sigma = per_token.exp()[..., None]
    z = x + sigma * eps
    error = posterior.squared_error(posterior.logits(head(z, log_sigma), z, sigma), x)
    weight = 1.0 / (per_token.exp().square() * distribution.density(per_token))
    integral = (groups.sums(error) * weight[..., None]).mean(-2)

    lowest = log_sigma[..., :1] * 0 + math.log(distribution.sigma_min)
    sigma = lowest.repeat_interleave(block_size, dim=0).exp()[..., None]
    z = x + sigma * gaussian(seed, RECONSTRUCTION, sample, first_block, blocks, 1, block_size, bits)
    reconstruction = posterior.cross_entropy(posterior.logits(head(z, lowest), z, sigma), x).squeeze(2)
    above = groups.sums(torch.full_like(x[:, :, 0], 0.5 / distribution.sigma_max**2))
    return integral + reconstruction + above
