"""Noise levels, normals that are a function of (seed, sequence, block), and the samplers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .configuration_bitlm import BitLMConfig

VALIDATION, SAMPLING, RECONSTRUCTION = 1, 2, 3  # streams of the noise, as in training
LEVEL = 0xFFFF  # element counter of a block's noise level; those of its bits count up from 0


def philox(key: tuple[int, int], counter: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011): four int64 tensors of 32-bit words for four broadcastable counters."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    (k0, k1), mask = key, 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & mask) ^ c1 ^ k0, p1 & mask, ((p0 >> 32) & mask) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def uniforms(
    seed: int, stream: int, sequence: Tensor, block: Tensor, levels: int, elements: Tensor, first_level: int = 0
) -> list[Tensor]:
    """sequence int64 [b], block int64 [b, n], elements int64 [E] to four float32 [b, n, levels, E] in (0, 1)."""
    mask = 0xFFFFFFFF
    level = torch.arange(first_level, first_level + levels, device=block.device)[:, None] * 65536
    row = sequence[:, None, None, None]
    counter = (level + elements, block.clamp(min=0)[..., None, None], row & mask, (row >> 32) & mask)
    words = philox((seed & mask, ((seed >> 32) ^ (stream * 0x9E3779B9)) & mask), counter)
    return [((word >> 9).float() + 0.5) * (1.0 / (1 << 23)) for word in words]


def stratified_levels(seed: int, stream: int, sequence: Tensor, block: Tensor, levels: int) -> Tensor:
    """float32 [b, n, M] in (0, 1), the m-th of a block in the m-th of M equal strata."""
    u = uniforms(seed, stream, sequence, block, levels, torch.tensor([LEVEL], device=block.device))[0][..., 0]
    return (torch.arange(levels, device=block.device) + u.clamp(max=1.0 - 2.0**-12)) / levels


def gaussian(
    seed: int,
    stream: int,
    sequence: Tensor,
    block: Tensor,
    levels: int,
    block_size: int,
    bits: int,
    first_level: int = 0,
) -> Tensor:
    """Standard normals float32 [b, n, M, K, B] (Box-Muller) for sequences [b] and blocks [b, n]."""
    count = block_size * bits
    elements = torch.arange(-(-count // 4), device=block.device)
    u0, u1, u2, u3 = uniforms(seed, stream, sequence, block, levels, elements, first_level)
    r0, r1 = torch.sqrt(-2.0 * torch.log(u0)), torch.sqrt(-2.0 * torch.log(u2))
    a0, a1 = u1 * (2 * math.pi), u3 * (2 * math.pi)
    eps = torch.stack((r0 * torch.cos(a0), r0 * torch.sin(a0), r1 * torch.cos(a1), r1 * torch.sin(a1)), dim=-1)
    return eps.flatten(3)[..., :count].unflatten(3, (block_size, bits))


class NoiseDistribution:
    """ln(sigma / 2) ~ Normal(mean, std) or Logistic(mean, std), truncated to [sigma_min, sigma_max]; or bins of ln
    sigma with measured probabilities (entropy_rate)."""

    def __init__(self, config: BitLMConfig) -> None:
        self.kind, self.masses = (
            config.sigma_kind,
            config.sigma_masses or [1.0],
        )  # no tensor: made on the meta device too
        self.sigma_min, self.sigma_max = config.sigma_min, config.sigma_max
        self.mean, self.std = config.sigma_log_mean, config.sigma_log_std

    def _cdf(self, sigma: float) -> float:
        if self.kind == "logistic":
            return 0.5 * (1.0 + math.tanh(0.5 * (math.log(sigma / 2) - self.mean) / self.std))
        return 0.5 * (1.0 + math.erf((math.log(sigma / 2) - self.mean) / (self.std * math.sqrt(2.0))))

    def log_sigma(self, u: Tensor) -> Tensor:
        """u in (0, 1) to ln sigma."""
        ends = math.log(self.sigma_min), math.log(self.sigma_max)
        if self.kind == "entropy_rate":
            masses, u = torch.tensor(self.masses, dtype=torch.float64, device=u.device), u.double()
            cdf = F.pad(masses.cumsum(0), (1, 0))
            index = torch.searchsorted(cdf[1:-1], u, right=True)
            place = (index + (u - cdf[index]) / masses[index]) / len(masses)
            return (ends[0] + (ends[1] - ends[0]) * place).float().clamp(*ends)
        low, high = self._cdf(self.sigma_min), self._cdf(self.sigma_max)
        standard = (torch.logit if self.kind == "logistic" else torch.special.ndtri)(low + u * (high - low))
        return (self.mean + self.std * standard + math.log(2.0)).clamp(*ends)

    def density(self, log_sigma: Tensor) -> Tensor:
        """Density over ln sigma."""
        if self.kind == "entropy_rate":
            width = math.log(self.sigma_max / self.sigma_min) / len(self.masses)
            index = ((log_sigma.double() - math.log(self.sigma_min)) / width).long().clamp(0, len(self.masses) - 1)
            masses = torch.tensor(self.masses, dtype=torch.float64, device=log_sigma.device)
            return (masses[index] / width).float()
        mass = self._cdf(self.sigma_max) - self._cdf(self.sigma_min)
        standard = (log_sigma - math.log(2.0) - self.mean) / self.std
        if self.kind == "logistic":
            return torch.sigmoid(standard) * torch.sigmoid(-standard) / (self.std * mass)
        return torch.exp(-0.5 * standard * standard) / (math.sqrt(2 * math.pi) * self.std * mass)

    def grid(self, steps: int, device: torch.device) -> Tensor:
        """float32 [steps], ln sigma falling: quantiles of the training distribution."""
        return self.log_sigma(torch.linspace(1.0, 0.0, steps, device=device).clamp(1e-6, 1 - 1e-6))


def progress(t: Tensor, groups: int, overlap: float) -> Tensor:
    """How far every group of a block has come at t: [...] to [..., K G] (megatron_bit/diffusion/front.py)."""
    if math.isinf(overlap):
        return t[..., None].expand(*t.shape, groups)
    return ((t[..., None] * (groups - 1 + overlap) - torch.arange(groups, device=t.device)) / overlap).clamp(0, 1)


Mean = Callable[[Tensor, Tensor], Tensor]  # (z, ln sigma) to E[x | z]
Noise = Callable[[int], Tensor]  # the i-th standard normal of a block


def _euler(z: Tensor, x_hat: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """A step of the probability-flow ODE, dz / dsigma = (z - x_hat) / sigma."""
    return x_hat + (after - now).exp() * (z - x_hat)


def _ode(mean: Mean, noise: Noise, grid: Tensor) -> Tensor:
    """Euler steps (DDIM)."""
    z = grid[0].exp() * noise(0)
    for now, after in itertools.pairwise(grid):
        z = _euler(z, mean(z, now), now, after)
    return z


def _heun(mean: Mean, noise: Noise, grid: Tensor) -> Tensor:
    """Second order: the slope at both ends of a step; two evaluations each (EDM, arXiv 2206.00364)."""
    z = grid[0].exp() * noise(0)
    for now, after in itertools.pairwise(grid):
        slope = (z - mean(z, now)) / now.exp()
        end = z + (after.exp() - now.exp()) * slope
        z = z + (after.exp() - now.exp()) * 0.5 * (slope + (end - mean(end, after)) / after.exp())
    return z


def _dpm(mean: Mean, noise: Noise, grid: Tensor) -> Tensor:
    """DPM-Solver++(2M): second order from the step before, one evaluation each (arXiv 2211.01095)."""
    z = grid[0].exp() * noise(0)
    before, width = torch.zeros_like(z), torch.full_like(grid[0], math.inf)
    for now, after in itertools.pairwise(grid):
        x_hat = mean(z, now)
        target = x_hat + (now - after) / (2.0 * width) * (x_hat - before)
        z, before, width = _euler(z, target, now, after), x_hat, now - after
    return z


def _em(mean: Mean, noise: Noise, grid: Tensor) -> Tensor:
    """The reverse SDE: each step draws from q(z_after | z_now, x_hat)."""
    z = grid[0].exp() * noise(0)
    for i, (now, after) in enumerate(itertools.pairwise(grid)):
        kept = (2.0 * (after - now)).exp()
        z = mean(z, now) * (1.0 - kept) + kept * z + after.exp() * (1.0 - kept).sqrt() * noise(i + 1)
    return z


def _churn(mean: Mean, noise: Noise, grid: Tensor) -> Tensor:
    """Euler steps, each from a level raised by a fifth with fresh noise (EDM's churn; S_noise 1.003)."""
    z = grid[0].exp() * noise(0)
    for i, (now, after) in enumerate(itertools.pairwise(grid)):
        raised = now + math.log(1.2)
        z = z + 1.003 * (raised.exp().square() - now.exp().square()).sqrt() * noise(i + 1)
        z = _euler(z, mean(z, raised), raised, after)
    return z


# A sampler takes the denoiser, normals and a falling grid of ln sigma, and returns z at the lowest level.
SAMPLERS: dict[str, Callable[[Mean, Noise, Tensor], Tensor]] = {
    "ode": _ode, "heun": _heun, "dpm": _dpm, "em": _em, "churn": _churn
}  # fmt: skip
