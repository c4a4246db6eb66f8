"""Philox4x32-10 against Random123's known answers, and what is made of its words."""

import math

import pytest
import torch

from megatron_bit.diffusion.philox import normal, philox, seed_key, uniform

ONES = 0xFFFFFFFF
# Random123's kat_vectors: counter, key, expected
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    words = philox(key, tuple(torch.tensor([c]) for c in counter))
    assert tuple(int(w) for w in words) == expected


def test_counters_broadcast():
    rows, columns, zero = torch.arange(3)[:, None], torch.arange(5)[None], torch.zeros(1, dtype=torch.int64)
    words = philox((1, 2), (rows, columns, zero, zero + ONES))
    assert all(w.shape == (3, 5) and w.dtype == torch.int64 for w in words)
    one = philox((1, 2), tuple(torch.tensor(c) for c in (2, 4, 0, ONES)))
    assert [int(w[2, 4]) for w in words] == [int(w) for w in one]


def test_uniform_is_open_at_both_ends():
    ends = uniform(torch.tensor([0, ONES]))
    assert ends.dtype == torch.float32 and 0 < ends[0] < 1e-7 and 1 - 1e-7 < ends[1] < 1


def kolmogorov_smirnov(values, cdf):
    """sqrt(n) times the largest distance between the empirical and the given distribution function."""
    values = values.flatten().double().sort().values
    n = len(values)
    theory = cdf(values)
    above = (torch.arange(1, n + 1) / n - theory).max()
    below = (theory - torch.arange(n) / n).max()
    return float(torch.maximum(above, below)) * math.sqrt(n)


def words(n, key=(7, 9)):
    zero = torch.zeros((), dtype=torch.int64)
    return philox(key, (torch.arange(n), zero, zero, zero))


def test_uniform_and_normal_distributions():
    n = 40_000
    for w in words(n):
        assert kolmogorov_smirnov(uniform(w), lambda u: u) < 1.95  # p = 0.001
    values = normal(words(n))
    assert values.shape == (n, 4) and values.dtype == torch.float32
    for column in values.unbind(-1):
        assert kolmogorov_smirnov(column, torch.special.ndtr) < 1.95
    x = values.double()
    assert x.mean(0).abs().max() < 4 / math.sqrt(n)
    assert (x.var(0) - 1).abs().max() < 4 * math.sqrt(2 / n)
    assert ((x**3).mean(0)).abs().max() < 4 * math.sqrt(15 / n)
    assert ((x**4).mean(0) - 3).abs().max() < 4 * math.sqrt(96 / n)
    correlation = x.T @ x / n - torch.eye(4)
    assert correlation.abs().max() < 4 * math.sqrt(2 / n)
    assert normal((torch.tensor(0), torch.tensor(0), torch.tensor(ONES), torch.tensor(ONES))).isfinite().all()


def test_seeds_and_streams_have_keys_of_their_own():
    seeds = [0, 1, 1234, ONES, 2**32, 2**63 - 1]
    keys = {seed_key(seed, stream) for seed in seeds for stream in range(4)}
    assert len(keys) == len(seeds) * 4
    assert all(0 <= word <= ONES for key in keys for word in key)
