"""Samplers: from noise to the bits of one block, given the backbone's state."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from mbit_kernels.matched_filter import posterior_logits, posterior_mean
from torch import Tensor

from megatron_bit.diffusion.noise import SAMPLING, NoiseDistribution, gaussian

Head = Callable[[Tensor, Tensor], Tensor]  # (z [K, b, 1, B], log_sigma [1, b, 1]) -> residual [K, b, 1, B]


def noise_grid(distribution: NoiseDistribution, steps: int, device: torch.device) -> Tensor:
    """float32 [steps], ln sigma falling: quantiles of the training distribution, so steps go where training went."""
    u = torch.linspace(1.0, 0.0, steps, device=device)
    return distribution.log_sigma(u.clamp(1e-6, 1 - 1e-6))


def sample_block(
    head: Head,
    distribution: NoiseDistribution,
    *,
    sampler: str,
    steps: int,
    seed: int,
    sequence: Tensor,
    block: int,
    block_size: int,
    bits: int,
) -> Tensor:
    """Denoise one block of every sequence.

    Args:
        sampler: a key of SAMPLERS.
        sequence: int64 [b], the index of each sequence: the key of its noise, whatever the batch.
        block: index of the block in the sequence.

    Returns:
        float32 [K, b, B], final log-odds of every bit; decode them to the nearest valid token.
    """
    grid = noise_grid(distribution, steps, sequence.device)
    start = gaussian(seed, SAMPLING, sequence, block, 1, 1, block_size, bits)

    def logits(z: Tensor, log_sigma: Tensor) -> Tensor:
        residual = head(z, log_sigma.expand(1, len(sequence), 1))
        return posterior_logits(residual, z, log_sigma.exp())

    return SAMPLERS[sampler](logits, start, grid).squeeze(2)


def _ode(logits: Callable[[Tensor, Tensor], Tensor], eps: Tensor, grid: Tensor) -> Tensor:
    """Euler steps of the probability-flow ODE, dz / dsigma = (z - x_hat) / sigma (DDIM)."""
    z = grid[0].exp() * eps
    for now, after in itertools.pairwise(grid):
        x_hat = posterior_mean(logits(z, now))
        z = x_hat + (after - now).exp() * (z - x_hat)
    return logits(z, grid[-1])


# A sampler takes (logits(z, ln sigma), starting noise, grid of ln sigma) and returns final log-odds. Add yours here.
SAMPLERS: dict[str, Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor]] = {"ode": _ode}
