"""With the exact posterior of a known distribution in the head's place: the bound is its entropy, samples follow it."""

import itertools
import math

import pytest
import torch
from mbit_kernels.matched_filter import CLIP

from megatron_bit.config import DiffusionConfig
from megatron_bit.diffusion.likelihood import token_bound
from megatron_bit.diffusion.noise import NoiseDistribution
from megatron_bit.inference.hf import modeling_bitlm as hf

DISTRIBUTION = NoiseDistribution.from_config(DiffusionConfig())
CODES = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)))  # two tokens of two bits
P = torch.softmax(2.0 * torch.randn(16, generator=torch.Generator().manual_seed(4)), 0)


def exact_head(z, log_sigma):
    """z [2n, b, M, 2], log_sigma [n, b, M] to residual [2n, b, M, 2]: the joint posterior of a block's two tokens."""
    blocks = z.unflatten(0, (-1, 2)).permute(0, 2, 3, 1, 4).flatten(3).double()  # [n, b, M, 4]
    sigma = log_sigma.double().exp()[..., None]
    joint = P.log() + blocks @ CODES.T.double() / sigma**2
    odds = torch.stack(
        [joint[..., CODES[:, j] > 0].logsumexp(-1) - joint[..., CODES[:, j] < 0].logsumexp(-1) for j in range(4)], -1
    )
    residual = odds - (2 * blocks / sigma**2).clamp(-CLIP, CLIP)
    return residual.unflatten(-1, (2, 2)).permute(0, 3, 1, 2, 4).flatten(0, 1).float()


def bound(head, x, sigma_min=0.1, block_size=2):
    distribution = NoiseDistribution(sigma_min, 160.0, DISTRIBUTION.mean, DISTRIBUTION.std)
    sample = torch.arange(x.shape[1])
    values = token_bound(head, x, sample, distribution, seed=3, first_block=0, block_size=block_size, noise_samples=16)
    assert values.shape == x.shape[:2]
    rows = values.unflatten(0, (-1, block_size)).sum(1).flatten().double()  # nats a block
    return float(rows.mean()), float(rows.std()) / math.sqrt(len(rows))


@pytest.mark.parametrize("sigma_min", [0.1, 0.7])
def test_bound_is_the_entropy(sigma_min):
    """Also where a large sigma_min leaves much to the reconstruction term (there the bits are read off one by one)."""
    entropy = float(-(P * P.log()).sum())
    drawn = torch.multinomial(P, 8000, replacement=True, generator=torch.Generator().manual_seed(1))
    x = CODES[drawn].view(100, 80, 2, 2).permute(0, 2, 1, 3).reshape(200, 80, 1, 2)
    mean, error = bound(exact_head, x, sigma_min)
    assert error < 0.02 * entropy
    assert -4 * error < mean - entropy < 4 * error + (0.1 if sigma_min > 0.5 else 0.0)


@pytest.mark.parametrize("sigma_min", [0.1, 0.7, 2.0])
def test_uniform_bits_cost_ln2_each_wherever_the_integral_ends(sigma_min):
    x = torch.randint(0, 2, (60, 90, 1, 3), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    mean, error = bound(lambda z, log_sigma: torch.zeros_like(z), x, sigma_min, block_size=1)
    assert error < 0.03 and abs(mean - 3 * math.log(2)) < 4 * error


def grid(steps):
    d = DISTRIBUTION
    own = hf.BitLMConfig(sigma_min=d.sigma_min, sigma_max=d.sigma_max, sigma_log_mean=d.mean, sigma_log_std=d.std)
    return hf.NoiseDistribution(own).grid(steps, torch.device("cpu"))


def sample(head, sequence, sampler="ode", steps=48, block=5):
    """Final log-odds [2, b, 2] of one block."""
    blocks = torch.full((len(sequence), 1), block)
    eps = hf.gaussian(9, hf.SAMPLING, sequence, blocks, 1, 2, 2)[:, 0].permute(2, 0, 1, 3)  # [2, b, 1, 2]

    def logits(z, log_sigma):
        return hf.posterior_logits(head(z, log_sigma.expand(1, len(sequence), 1)), z, log_sigma.exp())

    return hf.SAMPLERS[sampler](logits, eps, grid(steps)).squeeze(2)


@pytest.mark.parametrize("sampler", hf.SAMPLERS)
def test_samples_follow_the_distribution(sampler):
    n = 6000
    bits = sample(exact_head, torch.arange(n), sampler) > 0  # [2, n, 2]
    values = (bits.permute(1, 0, 2).reshape(n, 4) * torch.tensor([8, 4, 2, 1])).sum(-1)
    frequency = torch.bincount(values, minlength=16) / n
    assert (frequency - P).abs().sum() / 2 < 0.04
    independent = torch.stack([(P * (CODES[:, j] > 0)).sum() for j in range(4)])
    product = torch.where(CODES > 0, independent, 1 - independent).prod(-1)
    assert (product - P).abs().sum() / 2 > 0.1, "the toy distribution has to need the joint posterior"


def test_a_sample_depends_on_its_sequence_and_block_alone():
    together = sample(exact_head, torch.tensor([3, 2**40, 8]))
    torch.testing.assert_close(together[:, 1:2], sample(exact_head, torch.tensor([2**40])), rtol=1e-5, atol=1e-4)
    assert not torch.allclose(together, sample(exact_head, torch.tensor([3, 2**40, 8]), block=6))


def test_grid_falls_over_the_whole_range():
    levels = grid(15)
    assert levels.shape == (15,) and (levels.diff() < 0).all()
    assert levels[0] > math.log(120) and levels[-1] == pytest.approx(math.log(0.1), abs=1e-3)
    torch.testing.assert_close(levels, DISTRIBUTION.log_sigma(torch.linspace(1.0, 0.0, 15).clamp(1e-6, 1 - 1e-6)))
