"""Noise levels and noise: distribution, stratification, and independence of how the work is cut."""

import math

import pytest
import torch

from megatron_bit.config import DiffusionConfig
from megatron_bit.diffusion.noise import (
    CONDITION,
    RECONSTRUCTION,
    SAMPLING,
    TRAIN,
    VALIDATION,
    NoiseDistribution,
    bit_flips,
    chosen,
    gaussian,
    levels_apart,
    stratified_levels,
)

SEED = 2**40 + 5
SAMPLES = torch.tensor([0, 1, 17, 2**32 + 1, 2**45])  # 1 and 2^32 + 1 share the low word
DISTRIBUTION = NoiseDistribution.from_config(DiffusionConfig())


def levels(sample=SAMPLES, first=0, blocks=7, noise_samples=3, seed=SEED, stream=TRAIN):
    return stratified_levels(seed, stream, sample, first, blocks, noise_samples)


def noise(sample=SAMPLES, first=0, blocks=7, noise_samples=3, block_size=3, bits=11, seed=SEED, stream=TRAIN):
    return gaussian(seed, stream, sample, first, blocks, noise_samples, block_size, bits)


def test_a_slice_is_the_slice_of_the_whole_draw():
    """Over blocks (sequence parallelism), samples (data parallelism, micro-batches) and noise samples."""
    u, eps = levels(), noise()
    assert torch.equal(levels(first=2, blocks=4), u[2:6]) and torch.equal(noise(first=2, blocks=4), eps[6:18])
    order = torch.tensor([3, 0])
    assert torch.equal(levels(SAMPLES[order]), u[:, order]) and torch.equal(noise(SAMPLES[order]), eps[:, order])
    assert torch.equal(noise(noise_samples=2), eps[:, :, :2])
    assert torch.equal(levels(), u) and torch.equal(noise(), eps)


@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("bits", [1, 11, 16])
def test_shapes_at_odd_sizes(block_size, bits):
    eps = noise(block_size=block_size, bits=bits)
    assert eps.shape == (7 * block_size, 5, 3, bits) and eps.dtype == torch.float32
    assert eps.unique().numel() > 0.99 * eps.numel(), "values repeat"


def test_levels_of_parts_are_apart():
    """Each part has all strata, in an order of its own; a slice is that of the whole; neighbours are uncorrelated."""
    draw = {"seed": SEED, "sample": SAMPLES, "first_block": 0, "num_blocks": 60, "count": 3, "parts": 7}
    u = levels_apart(**draw)
    assert u.shape == (60, 5, 3, 7) and u.dtype == torch.float32 and u.min() > 0 and u.max() < 1
    strata = (u * 3).long()
    assert torch.equal(strata.sort(dim=2).values, torch.arange(3)[:, None].expand_as(strata))
    assert len(strata.permute(0, 1, 3, 2).flatten(0, 2).unique(dim=0)) == 3  # turned, and not shuffled
    cut = levels_apart(**{**draw, "sample": SAMPLES[[3, 0]], "first_block": 20, "num_blocks": 9})
    assert torch.equal(cut, u[20:29, [3, 0]])
    flat = u.permute(3, 0, 1, 2).flatten(1) - 0.5
    related = torch.corrcoef(flat)[~torch.eye(7, dtype=torch.bool)].abs().max()
    assert related < 4 / math.sqrt(flat.shape[1])
    assert not torch.equal(levels_apart(**{**draw, "seed": SEED + 1}), u)


def test_every_index_is_independent():
    """No two draws that differ in one key share values, and their correlation is that of independent ones."""
    base = {"blocks": 40, "block_size": 4, "bits": 16, "noise_samples": 2}
    reference = noise(**base)
    others = [noise(**base, stream=s) for s in (VALIDATION, SAMPLING, RECONSTRUCTION)]
    others += [noise(**base, seed=s) for s in (SEED + 1, SEED + 2**32, 5)]
    others += [noise(SAMPLES + d, **base) for d in (2**20, 2**33)]
    others += [
        noise(**base, first=40),
        reference.roll(1, 2),
        reference.roll(1, 1),
        reference.roll(4, 0),
        reference.roll(1, 0),
    ]
    n = reference.numel()
    for other in others:
        assert abs(float((reference * other).mean())) < 4 / math.sqrt(n)
        assert (reference == other).float().mean() < 1e-4
    u = levels(blocks=40)
    assert all(not torch.isin(levels(blocks=40, stream=s), u).any() for s in (VALIDATION, SAMPLING, RECONSTRUCTION))


def test_the_level_is_independent_of_the_noise():
    """The counter of the level is one that the largest block (64 tokens of 256 bits) does not reach."""
    eps = noise(SAMPLES[:2], blocks=2, noise_samples=1, block_size=64, bits=256).flatten()
    assert eps.unique().numel() > 0.98 * eps.numel()
    u = levels(torch.arange(50), blocks=64, noise_samples=1).flatten()
    first = noise(torch.arange(50), blocks=64, noise_samples=1, block_size=1, bits=1).flatten()
    assert abs(float(((u - 0.5) * first).mean())) < 4 / math.sqrt(12 * len(u))


@pytest.mark.parametrize("noise_samples", [1, 3, 4])
def test_one_level_in_every_stratum(noise_samples):
    u = levels(torch.arange(64), blocks=32, noise_samples=noise_samples)
    assert u.shape == (32, 64, noise_samples) and u.dtype == torch.float32
    assert torch.equal((u * noise_samples).floor(), torch.arange(noise_samples).float().expand_as(u))
    inside = (u * noise_samples) % 1
    assert abs(float(inside.mean()) - 0.5) < 4 / math.sqrt(12 * u.numel())
    assert ((inside.double() - 0.5) ** 2).mean().sub(1 / 12).abs() < 4 * 0.075 / math.sqrt(u.numel())
    if noise_samples > 1:
        correlation = ((inside[..., 0] - 0.5) * (inside[..., 1] - 0.5)).mean() * 12
        assert abs(float(correlation)) < 4 / math.sqrt(inside[..., 0].numel())


def exact_cdf(log_sigma, d=DISTRIBUTION):
    phi = lambda s: torch.special.ndtr((torch.as_tensor(s, dtype=torch.float64) - math.log(2) - d.mean) / d.std)  # noqa: E731
    low, high = phi(math.log(d.sigma_min)), phi(math.log(d.sigma_max))
    return (phi(log_sigma) - low) / (high - low)


@pytest.mark.parametrize("noise_samples", [1, 4])
def test_noise_levels_are_truncated_log_normal(noise_samples):
    log_sigma = DISTRIBUTION.log_sigma(levels(torch.arange(100), blocks=64, noise_samples=noise_samples))
    assert log_sigma.dtype == torch.float32
    assert math.log(0.1) - 1e-6 <= log_sigma.min() and log_sigma.max() <= math.log(160) + 1e-6
    n = log_sigma.numel()
    values = log_sigma.flatten().double().sort().values
    distance = (exact_cdf(values) - (torch.arange(n) + 0.5) / n).abs().max()
    assert float(distance) * math.sqrt(n) < 1.95
    mode = values[(values - math.log(2 * math.exp(-1.2))).abs() < 0.6].numel() / n
    assert 0.36 < mode < 0.46  # half a standard deviation around the mean, over the mass that the truncation leaves


def test_inverse_and_density_belong_to_the_same_distribution():
    u = torch.linspace(0.001, 0.999, 999)
    log_sigma = DISTRIBUTION.log_sigma(u)
    torch.testing.assert_close(exact_cdf(log_sigma.double()).float(), u, rtol=0, atol=1e-5)
    grid = torch.linspace(math.log(0.1), math.log(160.0), 20_001, dtype=torch.float64)
    assert abs(float(torch.trapezoid(DISTRIBUTION.density(grid), grid)) - 1) < 1e-6
    slope = (exact_cdf(grid[1:]) - exact_cdf(grid[:-1])) / grid.diff()
    torch.testing.assert_close(DISTRIBUTION.density((grid[1:] + grid[:-1]) / 2), slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 0.7), (0.3, 1.5)])
def test_logistic_levels(mean, std):
    logistic = NoiseDistribution(0.1, 160.0, mean, std, "logistic")
    cdf = lambda s: torch.sigmoid((torch.as_tensor(s, dtype=torch.float64) - math.log(2) - mean) / std)  # noqa: E731
    low, high = cdf(math.log(0.1)), cdf(math.log(160.0))
    u = torch.linspace(0.001, 0.999, 999)
    found = (cdf(logistic.log_sigma(u).double()) - low) / (high - low)
    torch.testing.assert_close(found.float(), u, rtol=0, atol=1e-5)
    grid = torch.linspace(math.log(0.1), math.log(160.0), 20_001, dtype=torch.float64)
    assert abs(float(torch.trapezoid(logistic.density(grid), grid)) - 1) < 1e-6
    slope = (cdf(grid[1:]) - cdf(grid[:-1])) / (high - low) / grid.diff()
    torch.testing.assert_close(logistic.density((grid[1:] + grid[:-1]) / 2), slope, rtol=1e-5, atol=1e-8)
    assert sum(logistic.masses(128)) == pytest.approx(1)


def test_ends_of_the_range_are_finite():
    ends = DISTRIBUTION.log_sigma(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([math.log(0.1), math.log(160.0)]), rtol=0, atol=0.02)
    wide = NoiseDistribution(1e-4, 1e6, 0.0, 1.0)
    assert wide.log_sigma(torch.tensor([0.0, 1.0])).isfinite().all()


def test_bits_of_the_context_flip_as_often_as_asked():
    """A sample has one probability, uniform below the largest; a slice is the slice of the whole draw."""
    sample = torch.arange(2**32 - 200, 2**32 + 200)
    flips = bit_flips(SEED, sample, 0, 40, 3, 11, 0.4)
    assert flips.shape == (120, 400, 11) and flips.dtype == torch.bool
    share = flips.float().mean((0, 2)).sort().values  # of a sample
    expected = 0.4 * (torch.arange(400) + 0.5) / 400
    assert float((share - expected).abs().max()) < 0.4 * 1.95 / math.sqrt(400) + 3 * math.sqrt(0.24 / 1320)
    assert torch.equal(bit_flips(SEED, sample[7:9], 5, 3, 3, 11, 0.4), flips[15:24, 7:9])
    assert not bit_flips(SEED, sample, 0, 40, 3, 11, 0.0).any()
    more = bit_flips(SEED, sample, 0, 40, 3, 11, 0.8)
    assert (more | ~flips).all() and more.sum() > 1.5 * flips.sum()
    centred = flips.float() - flips.float().mean((0, 2), keepdim=True)
    for other in (centred.roll(1, 2), centred.roll(1, 0), centred.roll(3, 0), centred.roll(1, 1)):
        assert abs(float((centred * other).mean())) < 4 * 0.16 / math.sqrt(flips.numel())


def test_chosen():
    """As many as asked for, blocks, samples and levels apart, and the same however the work is cut."""
    sample = torch.arange(2**32 - 150, 2**32 + 150)

    def pick(probability, seed=SEED, stream=CONDITION, sample=sample, first=0, blocks=100):
        return chosen(seed, stream, sample, first, blocks, 3, probability)

    taken = pick(0.3)
    assert taken.shape == (100, 300, 3) and taken.dtype == torch.bool
    assert abs(taken.float().mean() - 0.3) < 4 * (0.21 / taken.numel()) ** 0.5
    for dims in ((1, 2), (0, 2), (0, 1)):
        part = taken.float().mean(dims)
        assert (part - 0.3).abs().max() < 4.5 * (0.21 / (taken.numel() / len(part))) ** 0.5
    rolled = (taken.roll(1, dim) for dim in range(3))
    for other in (*rolled, pick(0.3, seed=SEED + 1), pick(0.3, stream=TRAIN)):
        assert abs((taken.float() - 0.3).mul(other.float() - 0.3).mean()) < 4 * 0.21 / taken.numel() ** 0.5
    assert torch.equal(pick(0.3, sample=sample[140:160], first=50, blocks=30), taken[50:80, 140:160])
    assert not pick(0.0).any() and pick(1.0).all()
    assert (pick(0.6) | ~taken).all(), "who is chosen at 0.3 is at 0.6"
    flips = bit_flips(SEED, sample, 0, 100, 1, 1, 1.0)[..., 0]
    assert abs((taken[..., 0].float() - 0.3).mul(flips.float() - flips.float().mean()).mean()) < 0.01
