"""Matched filter, losses and the likelihood bound, against closed forms."""

import itertools
import math

import pytest
import torch
from mbit_kernels.matched_filter import CLIP, cross_entropy, edm_weight, posterior_logits, squared_error

from megatron_bit.config import DiffusionConfig
from megatron_bit.diffusion.loss import denoising_loss
from megatron_bit.diffusion.noise import TRAIN, NoiseDistribution, gaussian, stratified_levels
from megatron_bit.diffusion.posterior import BitPosterior

DISTRIBUTION = NoiseDistribution.from_config(DiffusionConfig())


def draw(x, noise_samples=16):
    """Noise the bits x [s, 1, 1, B] with the code that training uses: z [s, 1, M, B], ln sigma [s, 1, M]."""
    sample, blocks = torch.tensor([11]), x.shape[0]
    log_sigma = DISTRIBUTION.log_sigma(stratified_levels(3, TRAIN, sample, 0, blocks, noise_samples))
    eps = gaussian(3, TRAIN, sample, 0, blocks, noise_samples, 1, x.shape[-1])
    return x + log_sigma.exp()[..., None] * eps, log_sigma


def loss_terms(residual, z, x, log_sigma, distribution, kind):
    return denoising_loss(BitPosterior(x.shape[-1], True), residual, z, x, log_sigma, distribution, kind)


def estimate(bound):
    """Mean and standard error over positions (the noise samples of one are stratified, so not independent)."""
    rows = bound.mean(-1).flatten().double()
    return float(rows.mean()), float(rows.std()) / math.sqrt(len(rows))


@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_independent_uniform_bits_cost_ln2_each(kind):
    bits = 3
    x = torch.randint(0, 2, (6000, 1, 1, bits), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    z, log_sigma = draw(x)
    mean, error = estimate(loss_terms(torch.zeros_like(z), z, x, log_sigma, DISTRIBUTION, kind).bound)
    assert error < 0.01 * bits * math.log(2)
    assert abs(mean - bits * math.log(2)) < 4 * error


def test_correlated_bits_cost_their_entropy():
    """4 bits with a known joint distribution and the exact posterior as residual; f = 0 costs more."""
    codes = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)))
    p = torch.softmax(2.5 * torch.randn(16, generator=torch.Generator().manual_seed(4)), 0)
    entropy = float(-(p * p.log()).sum())
    drawn = torch.multinomial(p, 8000, replacement=True, generator=torch.Generator().manual_seed(1))
    x = codes[drawn][:, None, None]
    z, log_sigma = draw(x)
    sigma = log_sigma.exp()[..., None].double()
    joint = p.log() + (z.double() @ codes.T.double()) / sigma**2  # [s, 1, M, 16]
    plus = torch.stack([joint[..., codes[:, j] > 0].logsumexp(-1) for j in range(4)], -1)
    minus = torch.stack([joint[..., codes[:, j] < 0].logsumexp(-1) for j in range(4)], -1)
    residual = (plus - minus - (2 * z / sigma**2).clamp(-CLIP, CLIP)).float()
    mean, error = estimate(loss_terms(residual, z, x, log_sigma, DISTRIBUTION, "mse").bound)
    assert error < 0.02 * entropy < 0.02 * 4 * math.log(2)
    assert abs(mean - entropy) < 4 * error
    unaware, _ = estimate(loss_terms(torch.zeros_like(z), z, x, log_sigma, DISTRIBUTION, "mse").bound)
    assert unaware > entropy + 0.1


def test_matched_filter_is_bayes_rule():
    z, sigma = torch.randn(999, dtype=torch.float64) * 2, torch.rand(999, dtype=torch.float64) * 3 + 0.5
    log_likelihood = lambda x: torch.distributions.Normal(x, sigma).log_prob(z)  # noqa: E731
    odds = log_likelihood(torch.tensor(1.0)) - log_likelihood(torch.tensor(-1.0))
    torch.testing.assert_close(posterior_logits(torch.zeros(999), z, sigma), odds.clamp(-30, 30))


def test_the_clip_holds_the_filter_and_lets_the_residual_through():
    residual = torch.tensor([0.0, 5.0, -70.0, 3.0], requires_grad=True)
    z, sigma = torch.tensor([9.0, 9.0, 9.0, -9.0]), torch.tensor([0.1])
    logits = posterior_logits(residual, z, sigma)
    assert logits.tolist() == [30.0, 35.0, -40.0, -27.0]
    logits.sum().backward()
    assert residual.grad.tolist() == [1.0] * 4
    assert posterior_logits(torch.zeros(1, dtype=torch.bfloat16), z[:1], sigma).dtype == torch.float32


def test_errors_against_float64():
    """Relative accuracy everywhere, also where the posterior is certain and the naive form would cancel."""
    logits = torch.linspace(-35, 35, 701)
    for x in (torch.tensor(1.0), torch.tensor(-1.0)):
        exact = 4 / (1 + (x.double() * logits.double()).exp()) ** 2
        torch.testing.assert_close(squared_error(logits, x).double(), exact, rtol=2e-5, atol=0)
        middle = logits.double()[abs(logits) < 8]
        torch.testing.assert_close(squared_error(middle, x.double()), (x - torch.tanh(middle / 2)) ** 2)
        entropy = torch.log1p((-x.double() * logits.double()).exp())
        torch.testing.assert_close(cross_entropy(logits, x).double(), entropy, rtol=2e-5, atol=0)


def test_edm_weight_in_the_convention_of_the_paper():
    """Weight and error on bits of {0, 1}, (sigma01^2 + 1/4) / (sigma01^2 / 4) (b - p)^2, give the same product."""
    sigma, logit = torch.tensor([0.1, 0.7, 2.0, 50.0], dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    sigma01, p = sigma / 2, torch.sigmoid(logit)
    paper = (sigma01**2 + 0.25) / (sigma01**2 * 0.25) * (1 - p) ** 2
    torch.testing.assert_close(edm_weight(sigma) * squared_error(logit, torch.ones_like(logit)), paper)


@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_denoising_loss_and_its_gradient_in_float64(kind):
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, 2, (5, 2, 1, 7), generator=generator) * 2.0 - 1
    log_sigma = torch.randn(5, 2, 3, generator=generator) * 0.5
    z = x + log_sigma.exp()[..., None] * torch.randn(5, 2, 3, 7, generator=generator)
    residual = torch.randn(5, 2, 3, 7, generator=generator).requires_grad_()
    terms = loss_terms(residual, z, x, log_sigma, DISTRIBUTION, kind)
    assert terms.loss.shape == terms.bound.shape == (5, 2, 3) and not terms.bound.requires_grad
    terms.loss.sum().backward()

    sigma = log_sigma.double().exp()[..., None]
    mean = torch.tanh((residual.detach() + (2 * z / sigma**2).clamp(-30, 30)) / 2)
    if kind == "mse":
        weight = (sigma**2 + 1) / sigma**2
        loss = weight * (x - mean) ** 2
        gradient = -weight * (x - mean) * (1 - mean**2)
    else:
        loss = -((1 + x * mean) / 2).log()
        gradient = (mean - x) / 2
    torch.testing.assert_close(terms.loss.double(), loss.mean(-1), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(residual.grad.double(), gradient / 7, rtol=1e-4, atol=1e-6)
    integrand = ((x - mean) ** 2).sum(-1) / sigma.squeeze(-1) ** 2 / DISTRIBUTION.density(log_sigma.double())
    torch.testing.assert_close(terms.bound.double(), integrand, rtol=1e-4, atol=1e-6)
