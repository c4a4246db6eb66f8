"""Noise levels and noise of the diffusion, keyed by global indices."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_bit.config import Config, DiffusionConfig
from megatron_bit.diffusion.entropy_rate import BINS, EntropyRate
from megatron_bit.diffusion.philox import normal, philox, seed_key, uniform

# streams: the same indices never share noise
TRAIN, VALIDATION, SAMPLING, RECONSTRUCTION, CONTEXT, CONDITION, ESTIMATE, LEVELS, APART, FRONT, BEHIND = range(11)
_LEVEL = 0xFFFF  # element counter of a block's noise level; values of eps count up from 0


@dataclass(frozen=True)
class NoiseDistribution:
    """ln(sigma / 2) ~ Normal(mean, std), truncated to [sigma_min, sigma_max] (CoBit's log-normal on {0, 1} bits).

    Or Logistic(mean, std as scale), whose tails are heavier.
    """

    sigma_min: float
    sigma_max: float
    mean: float
    std: float
    kind: Literal["lognormal", "logistic"] = "lognormal"

    @classmethod
    def from_config(cls, config: DiffusionConfig) -> NoiseDistribution:
        """Of `entropy_rate` what it begins with."""
        kind = "logistic" if config.noise == "logistic" else "lognormal"
        return cls(config.sigma_min, config.sigma_max, config.log_mean, config.log_std, kind)

    def _cdf(self, sigma: float) -> float:
        if self.kind == "logistic":
            return 0.5 * (1.0 + math.tanh(0.5 * (math.log(sigma / 2) - self.mean) / self.std))
        return 0.5 * (1.0 + math.erf((math.log(sigma / 2) - self.mean) / (self.std * math.sqrt(2.0))))

    def log_sigma(self, u: Tensor) -> Tensor:
        """Inverse distribution function: u in (0, 1) to ln sigma, float32, same shape."""
        low, high = self._cdf(self.sigma_min), self._cdf(self.sigma_max)
        quantile = torch.logit if self.kind == "logistic" else torch.special.ndtri
        standard = quantile(low + u * (high - low))
        return (self.mean + self.std * standard + math.log(2.0)).clamp(
            math.log(self.sigma_min), math.log(self.sigma_max)
        )

    def density(self, log_sigma: Tensor) -> Tensor:
        """Density over ln sigma, float32, same shape."""
        mass = self._cdf(self.sigma_max) - self._cdf(self.sigma_min)
        standard = (log_sigma - math.log(2.0) - self.mean) / self.std
        if self.kind == "logistic":
            return torch.sigmoid(standard) * torch.sigmoid(-standard) / (self.std * mass)
        return torch.exp(-0.5 * standard * standard) / (math.sqrt(2 * math.pi) * self.std * mass)

    def masses(self, bins: int) -> list[float]:
        """Probabilities of equal bins of ln sigma, from sigma_min on."""
        low, width = math.log(self.sigma_min), math.log(self.sigma_max / self.sigma_min) / bins
        edges = [self._cdf(math.exp(low + i * width)) for i in range(bins + 1)]
        return [(after - before) / (edges[-1] - edges[0]) for before, after in itertools.pairwise(edges)]


Distribution = NoiseDistribution | EntropyRate


def build_noise(config: Config, device: torch.device) -> Distribution:
    """The distribution of noise levels that a configuration asks for; of `entropy_rate` before anything is measured."""
    d = config.diffusion
    base = NoiseDistribution.from_config(d)
    if d.noise != "entropy_rate":
        return base
    return EntropyRate(d.sigma_min, d.sigma_max, config.model.bits, base.masses(BINS), d.noise_warmup, device)


def _counters(sample: Tensor, first_block: int | Tensor, num_blocks: int, noise_samples: int) -> tuple[Tensor, ...]:
    """Counter words (noise sample, block, sample low, sample high) with shapes that broadcast to [n, b, M].

    first_block: of so many in a row; or int64 [n, b], which blocks of each sample.
    """
    device = sample.device
    level = torch.arange(noise_samples, device=device)[None, None, :]
    if isinstance(first_block, Tensor):
        block = first_block[..., None]
    else:
        block = torch.arange(first_block, first_block + num_blocks, device=device)[:, None, None]
    low = (sample & 0xFFFFFFFF)[None, :, None]
    high = ((sample >> 32) & 0xFFFFFFFF)[None, :, None]
    return level, block, low, high


def stratified_levels(
    seed: int, stream: int, sample: Tensor, first_block: int, num_blocks: int, noise_samples: int
) -> Tensor:
    """One uniform for every block and noise sample, the m-th in the m-th of M equal strata of (0, 1).

    Args:
        sample: int64 [b], global sample indices.
        first_block, num_blocks: the blocks of the sequence this rank holds.

    Returns:
        float32 [num_blocks, b, noise_samples].
    """
    level, block, low, high = _counters(sample, first_block, num_blocks, noise_samples)
    words = philox(seed_key(seed, stream), (level * 65536 + _LEVEL, block, low, high))
    # float32 cannot hold the last values below a stratum's upper edge: stay inside it
    return (level + uniform(words[0]).clamp(max=1.0 - 2.0**-12)) / noise_samples


def levels_apart(seed: int, sample: Tensor, first_block: int, num_blocks: int, count: int, parts: int) -> Tensor:
    """Uniforms for every part of a block, such as its groups of bits: those of a part lie in as many equal strata of
    (0, 1) as there are, in an order of its own, so that the levels of two parts have nothing to do with each other.

    Returns:
        float32 [num_blocks, b, count, parts]; a function of (seed, sample, block, part, which of them) alone.
    """
    level, block, low, high = (c[..., None] for c in _counters(sample, first_block, num_blocks, count))
    element, key = torch.arange(-(-parts // 4), device=sample.device), seed_key(seed, LEVELS)

    def drawn(level: Tensor) -> Tensor:
        words = philox(key, (level * 65536 + element, block, low, high))
        return uniform(torch.stack(words, dim=-1)).flatten(-2)[..., :parts]

    turned = level + (drawn(level[..., :1, :] + count) * count).long()
    return (turned % count + drawn(level).clamp(max=1.0 - 2.0**-12)) / count


def gaussian(
    seed: int,
    stream: int,
    sample: Tensor,
    first_block: int | Tensor,
    num_blocks: int,
    noise_samples: int,
    block_size: int,
    bits: int,
) -> Tensor:
    """Standard normal noise for every bit.

    first_block: of num_blocks in a row; or int64 [num_blocks, b], which blocks of each sample.

    Returns:
        float32 [num_blocks * block_size, b, noise_samples, bits]; the value of a bit depends on (seed, stream,
        sample, block, noise sample, place in the block) alone.
    """
    return keyed_gaussian(seed_key(seed, stream), sample, first_block, num_blocks, noise_samples, block_size, bits)


def keyed_gaussian(
    key: tuple[int, int],
    sample: Tensor,
    first_block: int | Tensor,
    num_blocks: int,
    noise_samples: int,
    block_size: int,
    bits: int,
) -> Tensor:
    """`gaussian` of a Philox key."""
    count = block_size * bits
    groups = -(-count // 4)
    level, block, low, high = (c[..., None] for c in _counters(sample, first_block, num_blocks, noise_samples))
    element = torch.arange(groups, device=sample.device)
    eps = normal(philox(key, (level * 65536 + element, block, low, high)))
    n, b = num_blocks, sample.shape[0]
    eps = eps.reshape(n, b, noise_samples, groups * 4)[..., :count]
    eps = eps.reshape(n, b, noise_samples, block_size, bits).permute(0, 3, 1, 2, 4)
    return eps.reshape(n * block_size, b, noise_samples, bits)


def block_uniforms(seed: int, stream: int, sample: Tensor, block: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Uniforms for parts of blocks, float32 [n, b, count], and four more for each block, [n, b, 4].

    block: int64 [n, b], which blocks of each sample. Functions of (seed, stream, sample, block, part) alone.
    """
    _, block, low, high = _counters(sample, block, len(block), 1)
    key, element = seed_key(seed, stream), torch.arange(-(-count // 4), device=sample.device)
    of_parts, of_block = (
        uniform(torch.stack(philox(key, (e, block, low, high)), dim=-1)).flatten(-2)
        for e in (element, torch.full_like(element[:1], _LEVEL))
    )
    return of_parts[..., :count], of_block


def bit_flips(
    seed: int, sample: Tensor, first_block: int, num_blocks: int, block_size: int, bits: int, most: float
) -> Tensor:
    """Which input bits of the backbone are wrong in training: each with probability `most` times its sample's uniform.

    Returns:
        bool [num_blocks * block_size, b, bits]; a function of (seed, sample, block, place in the block) alone.
    """
    count = block_size * bits
    _, block, low, high = (c[..., None] for c in _counters(sample, first_block, num_blocks, 1))
    key, n, b = seed_key(seed, CONTEXT), num_blocks, len(sample)
    share = uniform(philox(key, (torch.full_like(low, _LEVEL), torch.zeros_like(low), low, high))[0])
    element = torch.arange(-(-count // 4), device=sample.device)
    drawn = uniform(torch.stack(philox(key, (element, block, low, high)), dim=-1)).reshape(n, b, -1)[..., :count]
    wrong = drawn < most * share.view(1, b, 1)
    return wrong.unflatten(-1, (block_size, bits)).permute(0, 2, 1, 3).reshape(n * block_size, b, bits)


def chosen(
    seed: int, stream: int, sample: Tensor, first_block: int, num_blocks: int, noise_samples: int, probability: float
) -> Tensor:
    """True with that probability, each noise sample of each block by itself.

    Returns:
        bool [num_blocks, b, noise_samples]; a function of (seed, stream, sample, block, noise sample) alone.
    """
    level, block, low, high = _counters(sample, first_block, num_blocks, noise_samples)
    words = philox(seed_key(seed, stream), (level * 65536 + _LEVEL, block, low, high))
    return uniform(words[0]) < probability
