"""The measured density of noise levels: what it measures, what it draws, and what a checkpoint keeps of it."""

import json
import math

import pytest
import torch
from mbit_kernels.matched_filter import squared_error

from megatron_bit.config import Config, config_from_dict
from megatron_bit.diffusion.entropy_rate import BINS, FLOOR, EntropyRate, independent_rate
from megatron_bit.diffusion.noise import NoiseDistribution, build_noise
from megatron_bit.errors import UserError

BITS = 5


def make(warmup=0, **diffusion) -> EntropyRate:
    settings = {"noise": "entropy_rate", "noise_warmup": warmup, **diffusion}
    config: Config = config_from_dict({"model": {"bits": BITS, "group_bits": 1}, "diffusion": settings})
    table = build_noise(config, torch.device("cpu"))
    assert isinstance(table, EntropyRate)
    return table


def centers(table):
    return table.low + (torch.arange(BINS) + 0.5) * table.width


def measure(table, steps, seed=0, count=40_000, bits=BITS):
    """Independent bits and their exact denoiser, drawn from the table itself."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        u = (torch.arange(count) + torch.rand(count, generator=generator).clamp(1e-4, 1 - 1e-4)) / count
        log_sigma = table.log_sigma(u)
        sigma = log_sigma.exp()[:, None]
        z = 1 + sigma * torch.randn(count, bits, generator=generator)
        error = squared_error(2 * z / sigma**2, torch.ones(())).sum(-1)
        table.update(table.histogram(log_sigma, error / sigma.squeeze(-1) ** 2))


def test_the_table_follows_the_known_rate_of_independent_bits():
    """Of fewer bits than the prior believes, so that what is found was measured."""
    table = make()
    known = independent_rate(centers(table), 2)
    assert (table.rate - known).abs().max() > 0.5 * known.max()
    measure(table, 60, bits=2)
    assert float((table.rate - known).abs().max()) < 0.05 * float(known.max())
    assert float((table.rate.sum() - known.sum()).abs()) < 0.03 * float(known.sum())
    # the integral of the rate over ln sigma is the entropy
    assert float(known.sum()) * table.width == pytest.approx(2 * math.log(2), rel=1e-3)
    sigma01 = centers(table).double().exp() / 2
    wanted = sigma01**3 / (sigma01**3 + 0.1**3) * table.rate.sqrt()
    expected = (1 - FLOOR) * wanted / wanted.sum() + FLOOR / BINS
    torch.testing.assert_close(table.masses, expected, rtol=1e-5, atol=0)


def test_inverse_and_density_belong_to_the_same_distribution():
    table = make()
    measure(table, 3)
    u = (torch.arange(200_000) + 0.5) / 200_000
    log_sigma = table.log_sigma(u)
    assert log_sigma.dtype == torch.float32 and (log_sigma.diff() >= 0).all()
    share = torch.histc(log_sigma, BINS, table.low, table.low + BINS * table.width) / len(u)
    torch.testing.assert_close(share.double(), table.masses, rtol=0, atol=2e-5)
    density = table.density(centers(table))
    assert float((density * table.width).sum()) == pytest.approx(1.0, abs=1e-6)
    assert density.dtype == torch.float32 and density.min() >= FLOOR / BINS / table.width * 0.999
    ends = table.log_sigma(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([math.log(0.1), math.log(160.0)]))


def test_warm_up_is_log_normal_and_then_blended_in():
    table, base = make(warmup=4), NoiseDistribution(0.1, 160.0, -1.2, 1.2)
    begin = torch.tensor(base.masses(BINS), dtype=torch.float64)
    u = torch.linspace(0.01, 0.99, 99)
    torch.testing.assert_close(table.log_sigma(u), base.log_sigma(u), rtol=0, atol=2e-3)
    distance = []
    for _ in range(9):
        distance.append(float((table.masses - begin).abs().sum()))
        measure(table, 1, count=2000)
    assert max(distance[:5]) < 1e-12 < min(distance[5:])
    assert distance[5] < distance[6] < distance[7] < distance[8]
    grown = make()
    grown.load(table.to_json())
    assert torch.equal(grown.masses, table.masses)


def test_a_step_that_is_not_finite_leaves_the_rates_alone():
    table = make()
    measure(table, 2, count=1000)
    sums, counts = table.sums.clone(), table.counts.clone()
    bad = torch.zeros(2 * BINS)
    for value in (math.inf, math.nan):
        bad[7] = value
        table.update(bad)
    assert torch.equal(table.sums, sums) and torch.equal(table.counts, counts) and table.steps == 4


def test_json_gives_it_back_to_the_bit():
    table, other = make(warmup=3), make(warmup=3)
    measure(table, 5, count=3000)
    other.load(json.loads(json.dumps(table.to_json())))
    assert torch.equal(other.masses, table.masses) and torch.equal(other.sums, table.sums)
    measure(table, 1, seed=4)
    measure(other, 1, seed=4)
    assert torch.equal(other.masses, table.masses)
    with pytest.raises(UserError, match=r"diffusion.sigma_min is 0.2, .* 0.1; set diffusion.sigma_min=0.1"):
        make(sigma_min=0.2).load(table.to_json())
