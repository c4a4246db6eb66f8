"""Groups of bits: values, posteriors and losses, against brute force over all codes and against single bits."""

import itertools

import pytest
import torch

from megatron_bit.config import ModelConfig
from megatron_bit.diffusion.bit_groups import BitGroups
from megatron_bit.diffusion.posterior import BitPosterior, GroupPosterior

SIZES = [(1, 1, 1), (4,), (3, 2), (2, 2, 1)]


@pytest.mark.parametrize(
    ("bits", "group_bits", "sizes"),
    [(12, 1, (1,) * 12), (12, 8, (6, 6)), (15, 8, (8, 7)), (11, 4, (4, 4, 3)), (10, 10, (10,)), (1, 1, (1,))],
)
def test_sizes_are_even(bits, group_bits, sizes):
    model = ModelConfig(bits=bits, group_bits=group_bits)
    assert model.group_sizes == sizes
    assert model.group_values == len(sizes) * 2 ** max(sizes)


@pytest.mark.parametrize("sizes", SIZES)
def test_values_are_the_binary_numbers_of_the_groups(sizes):
    groups = BitGroups(sizes)
    every = torch.tensor(list(itertools.product((-1, 1), repeat=sum(sizes))), dtype=torch.int8)
    expected = []
    for bits in every.tolist():
        left = list(bits)
        digits = [[left.pop(0) > 0 for _ in range(size)] for size in sizes]
        expected.append([int("".join(str(int(d)) for d in group), 2) for group in digits])
    assert groups.index(every).tolist() == expected
    assert (~groups.invalid).sum(-1).tolist() == [2**size for size in sizes]


@pytest.mark.parametrize("sizes", SIZES)
def test_posterior_against_bayes_rule_over_all_values(sizes):
    """Mean, squared error and cross-entropy from explicit Gaussian likelihoods, in float64."""
    generator = torch.Generator().manual_seed(3)
    bits, groups = sum(sizes), BitGroups(sizes)
    posterior = GroupPosterior(groups, matched=True)
    x = torch.randint(0, 2, (40, bits), generator=generator) * 2.0 - 1
    sigma = torch.rand(40, 1, generator=generator) * 2 + 0.4
    z = x + sigma * torch.randn(40, bits, generator=generator)
    residual = torch.randn(40, posterior.outputs, generator=generator)
    logits = posterior.logits(residual, z, sigma)
    mean, entropy = [], []
    for i, (size, part) in enumerate(zip(sizes, residual.unflatten(-1, (len(sizes), -1)).unbind(1), strict=True)):
        first = sum(sizes[:i])
        here = slice(first, first + size)
        codes = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size)), dtype=torch.float64)
        likelihood = torch.distributions.Normal(codes, sigma[:, None].double()).log_prob(z[:, None, here]).sum(-1)
        p = (part[:, : 2**size] + likelihood).softmax(-1)
        mean.append(p @ codes)
        true = (codes == x[:, None, here]).all(-1)
        entropy.append(-p[true].log())
    mean, entropy = torch.cat(mean, -1), torch.stack(entropy, -1)
    assert logits.exp().sum(-1).allclose(torch.ones(()))
    torch.testing.assert_close(posterior.mean(logits).double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(posterior.squared_error(logits, x).double(), (x - mean) ** 2, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(posterior.cross_entropy(logits, x).double(), entropy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("matched", [True, False])
def test_groups_of_one_bit_are_single_bits(matched):
    generator = torch.Generator().manual_seed(5)
    single, groups = BitPosterior(7, matched), GroupPosterior(BitGroups((1,) * 7), matched)
    x = torch.randint(0, 2, (30, 7), generator=generator) * 2.0 - 1
    sigma = torch.rand(30, 1, generator=generator) * 2 + 0.2
    z, odds = x + sigma * torch.randn(30, 7, generator=generator), torch.randn(30, 7, generator=generator)
    a = single.logits(odds, z, sigma)
    b = groups.logits(torch.stack((-odds / 2, odds / 2), -1).flatten(-2), z, sigma)
    torch.testing.assert_close(groups.mean(b), single.mean(a), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(groups.squared_error(b, x), single.squared_error(a, x), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(groups.cross_entropy(b, x), single.cross_entropy(a, x), rtol=1e-4, atol=1e-5)
