"""With the exact posterior of a known distribution in the head's place: the bound is its entropy, samples follow it."""

import itertools
import math

import pytest
import torch
from mbit_kernels.matched_filter import CLIP

from megatron_bit.config import DiffusionConfig, config_from_dict
from megatron_bit.diffusion.bit_groups import BitGroups
from megatron_bit.diffusion.entropy_rate import BINS, EntropyRate
from megatron_bit.diffusion.likelihood import token_bound
from megatron_bit.diffusion.noise import NoiseDistribution, build_noise
from megatron_bit.diffusion.posterior import BitPosterior, GroupPosterior
from megatron_bit.inference.hf import configuration_bitlm as hf_configuration
from megatron_bit.inference.hf import noise_bitlm as hf_noise

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


def bound(head, x, sigma_min=0.1, block_size=2, posterior=None, distribution=None):
    distribution = distribution or NoiseDistribution(sigma_min, 160.0, DISTRIBUTION.mean, DISTRIBUTION.std)
    sample = torch.arange(x.shape[1])
    posterior = posterior or BitPosterior(x.shape[-1], True)
    groups = posterior.groups if isinstance(posterior, GroupPosterior) else BitGroups([1] * x.shape[-1])
    values = token_bound(
        head, posterior, groups, x, sample, distribution, seed=3, first_block=0, block_size=block_size, noise_samples=16
    )
    assert values.shape == (*x.shape[:2], groups.count)
    rows = values.sum(-1).unflatten(0, (-1, block_size)).sum(1).flatten().double()  # nats a block
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


@pytest.mark.parametrize("kind", ["logistic", "entropy_rate", "skewed"])
def test_bound_is_the_entropy_whatever_the_levels_are_drawn_from(kind):
    """Also where a table has measured something that is far from the truth."""
    entropy = float(-(P * P.log()).sum())
    drawn = torch.multinomial(P, 8000, replacement=True, generator=torch.Generator().manual_seed(1))
    x = CODES[drawn].view(100, 80, 2, 2).permute(0, 2, 1, 3).reshape(200, 80, 1, 2)
    noise = "logistic" if kind == "logistic" else "entropy_rate"
    settings = {"model": {"bits": 2}, "diffusion": {"noise": noise, "noise_warmup": 0, "log_std": 0.8}}
    distribution = build_noise(config_from_dict(settings), torch.device("cpu"))
    if kind == "skewed":
        assert isinstance(distribution, EntropyRate)
        distribution.update(torch.rand(2 * BINS, generator=torch.Generator().manual_seed(3)) ** 4)
    mean, error = bound(exact_head, x, distribution=distribution)
    assert error < (0.04 if kind == "skewed" else 0.02) * entropy and abs(mean - entropy) < 4 * error


@pytest.mark.parametrize("sizes", [(4,), (2, 2)])
def test_bound_of_the_exact_group_posterior_is_the_entropy(sizes):
    """One token of 4 bits. A group of all bits needs nothing but the prior: that is the dial's end."""
    drawn = torch.multinomial(P, 8000, replacement=True, generator=torch.Generator().manual_seed(1))
    x = CODES[drawn].view(100, 80, 1, 4)
    posterior = GroupPosterior(BitGroups(sizes), matched=True)

    def head(z, log_sigma):
        if len(sizes) == 1:
            return P.log().expand(*z.shape[:-1], 16)
        joint = (P.log() + z @ CODES.T / log_sigma.exp()[..., None] ** 2).unflatten(-1, (4, 4))  # [.., first, second]
        own = posterior.evidence(z, log_sigma.exp()[..., None])
        return torch.cat((joint.logsumexp(-1) - own[..., 0, :], joint.logsumexp(-2) - own[..., 1, :]), -1)

    entropy = float(-(P * P.log()).sum())
    mean, error = bound(head, x, block_size=1, posterior=posterior)
    assert error < 0.02 * entropy and abs(mean - entropy) < 4 * error
    apart, _ = bound(lambda z, _: torch.zeros(*z.shape[:-1], posterior.outputs), x, block_size=1, posterior=posterior)
    assert apart == pytest.approx(4 * math.log(2), abs=0.1) and apart > entropy + 0.1


@pytest.mark.parametrize("sigma_min", [0.1, 0.7, 2.0])
def test_uniform_bits_cost_ln2_each_wherever_the_integral_ends(sigma_min):
    x = torch.randint(0, 2, (60, 90, 1, 3), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    mean, error = bound(lambda z, log_sigma: torch.zeros_like(z), x, sigma_min, block_size=1)
    assert error < 0.03 and abs(mean - 3 * math.log(2)) < 4 * error


def grid(steps):
    d = DISTRIBUTION
    own = hf_configuration.BitLMConfig(
        sigma_min=d.sigma_min, sigma_max=d.sigma_max, sigma_log_mean=d.mean, sigma_log_std=d.std
    )
    return hf_noise.NoiseDistribution(own).grid(steps, torch.device("cpu"))


def sample(head, sequence, sampler="ode", steps=48, block=5):
    """Final log-odds [2, b, 2] of one block."""
    blocks = torch.full((len(sequence), 1), block)

    def noise(i):
        return hf_noise.gaussian(9, hf_noise.SAMPLING, sequence, blocks, 1, 2, 2, i)[:, 0].permute(
            2, 0, 1, 3
        )  # [2, b, 1, 2]

    def logits(z, log_sigma):
        residual = head(z, log_sigma.expand(1, len(sequence), 1))
        return residual + (2 * z / log_sigma.exp() ** 2).clamp(-CLIP, CLIP)

    levels = grid(steps)
    z = hf_noise.SAMPLERS[sampler](lambda z, log_sigma: torch.tanh(0.5 * logits(z, log_sigma)), noise, levels)
    return logits(z, levels[-1]).squeeze(2)


def frequencies(bits):
    """bool [2, n, 2] to counts of the 16 blocks."""
    values = (bits.permute(1, 0, 2).reshape(-1, 4) * torch.tensor([8, 4, 2, 1])).sum(-1)
    return torch.bincount(values, minlength=16)


@pytest.mark.parametrize(("sampler", "steps"), [("ode", 160), ("heun", 100), ("dpm", 60), ("em", 160), ("churn", 160)])
def test_samples_pass_a_chi_square_test(sampler, steps):
    """At the 0.1 % level (13 degrees of freedom: 34.5; rare values together), with steps enough for each.

    Bits drawn apart are far from passing.
    """
    n, limit = 3000, 34.5

    def chi_square(counts):
        seen, expected = (torch.cat((v[n * P >= 8], v[n * P < 8].sum(0, keepdim=True))) for v in (counts, n * P))
        assert len(expected) == 14
        return float(((seen - expected) ** 2 / expected).sum())

    assert chi_square(frequencies(sample(exact_head, torch.arange(n), sampler, steps) > 0)) < limit
    independent = torch.stack([(P * (CODES[:, j] > 0)).sum() for j in range(4)])
    product = torch.where(CODES > 0, independent, 1 - independent).prod(-1)
    assert chi_square(n * product) > 10 * limit, "the toy has to need the joint posterior"


def test_every_sampler_is_tested():
    assert set(hf_noise.SAMPLERS) == {"ode", "heun", "dpm", "em", "churn"}


def test_a_sample_depends_on_its_sequence_and_block_alone():
    together = sample(exact_head, torch.tensor([3, 2**40, 8]))
    torch.testing.assert_close(together[:, 1:2], sample(exact_head, torch.tensor([2**40])), rtol=1e-5, atol=1e-4)
    assert not torch.allclose(together, sample(exact_head, torch.tensor([3, 2**40, 8]), block=6))


def test_grid_falls_over_the_whole_range():
    levels = grid(15)
    assert levels.shape == (15,) and (levels.diff() < 0).all()
    assert levels[0] > math.log(120) and levels[-1] == pytest.approx(math.log(0.1), abs=1e-3)
    torch.testing.assert_close(levels, DISTRIBUTION.log_sigma(torch.linspace(1.0, 0.0, 15).clamp(1e-6, 1 - 1e-6)))
