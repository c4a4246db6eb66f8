"""Noisy blocks of a chain: which they are, what they see, and bounds along a front of noise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megatron_bit.diffusion.front import drawn_progress, progress
from megatron_bit.model.chunk import BoundOutput, TokenBatch
from megatron_bit.model.noisy import every_block, one_in, take

CHAIN = [
    "model.head.kind=chain", "model.group_bits=4", "diffusion.noisy_every=2", "model.names=sum",
    "model.head.prior_rank=0",
]  # fmt: skip


def batch(config, size, vocabulary=1999):
    shape = (size, config.data.seq_length)
    tokens = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(1))
    return TokenBatch(tokens, torch.arange(2**32 - 1, 2**32 - 1 + size))


@pytest.mark.parametrize("overlap", [1.0, 2.5, 8.0, math.inf])
def test_a_front(overlap):
    t = torch.linspace(0, 1, 401)
    come = progress(t, 6, overlap)
    assert (come[0] == 0).all() and (come[-1] == 1).all()
    assert (come.diff(dim=0) >= 0).all() and (come.diff(dim=1) <= 0).all()
    moving = ((come > 0) & (come < 1)).sum(1)
    assert moving.max() == (6 if math.isinf(overlap) else min(6, math.ceil(overlap)))
    if overlap == 1:  # one after the other
        assert ((come[:, 1:] == 0) | (come[:, :-1] == 1)).all()


def test_how_far_groups_have_come_in_training():
    sample = torch.arange(2**33, 2**33 + 500)
    block = torch.arange(40)[:, None].expand(-1, 500)
    come = drawn_progress(3, sample, block, 6).flatten(0, 1)
    assert come.min() == 0 and come.max() == 1
    masks = ((come == 0) | (come == 1)).all(1)
    fronts = (come.diff(dim=1) <= 0).all(1) & ~masks
    assert masks.float().mean() == pytest.approx(1 / 3, abs=0.1)  # with fronts of one group between two others
    assert fronts.float().mean() == pytest.approx(1 / 3, abs=0.1)
    assert come.mean() == pytest.approx(0.5, abs=0.02)
    picked = drawn_progress(3, sample[[7, 2]], torch.tensor([[5, 30]]), 6)
    whole = drawn_progress(3, sample, block, 6)
    assert torch.equal(picked[0], torch.stack((whole[5, 7], whole[30, 2])))
    assert not torch.equal(drawn_progress(4, sample, block, 6), whole)


@pytest.mark.parametrize("every", [1, 2, 5, 7, 30])
@pytest.mark.parametrize(("blocks", "shards"), [(12, 1), (12, 2), (12, 4), (13, 1)])
def test_one_block_of_every_so_many(every, blocks, shards):
    """The same ones whatever the ranks, as many rows on each of them, one for each cell."""
    sample = torch.tensor([3, 4, 2**40 + 1])
    found = []
    for shard in range(shards):
        place = one_in(every, sample, blocks, shards, shard, 3)
        inside = place.block[place.mine]
        assert inside.min() >= shard * blocks // shards and inside.max() < (shard + 1) * blocks // shards
        assert torch.equal(place.rows, place.positions[place.mine.start * 3 : place.mine.stop * 3] - place.first)
        found += [(b, int(inside[i, b])) for i, b in itertools.product(*map(range, inside.shape)) if place.counts[i, b]]
    for b in range(3):
        mine = sorted(block for row, block in found if row == b)
        assert [block // every for block in mine] == list(range(-(-blocks // every)))
    assert len(set(found)) == len(found)
    if 1 < every < blocks:
        assert len({tuple(block for row, block in sorted(found) if row == b) for b in range(3)}) > 1


def test_take_is_a_gather():
    x = torch.randn(7, 2, 3)
    at = torch.tensor([[6, 0], [1, 1]])
    assert torch.equal(take(x, at), torch.stack([torch.stack([x[at[i, b], b] for b in range(2)]) for i in range(2)]))


def bounds(model, given, overlap, times):
    """Means and standard errors of each sample's bound, over noise of its own."""
    many = TokenBatch(given.tokens.repeat(times, 1), torch.arange(times)[:, None].add(1000 * given.sample).flatten())
    with torch.no_grad():
        found = model.front_bound(model.hidden(many.tokens), many, overlap).per_sample.view(times, -1).double()
    return found.mean(0), found.std(0) / math.sqrt(times)


@pytest.mark.parametrize("more", [[], ["model.names=pairs", "model.head.prior_rank=7", "model.memory.rows=9"]])
def test_a_front_of_one_group_is_the_exact_likelihood(more, make_config, make_model):
    config = make_config(3, 1, *CHAIN, *more, "evaluate.noise_samples=32")
    model, given = make_model(config).eval(), batch(config, 2)
    with torch.no_grad():
        exact = model(given).per_sample.double()
    mean, error = bounds(model, given, 1.0, 400)
    assert ((mean - exact).abs() < 4 * error + 1e-3).all() and (error < 0.03 * exact).all()


@pytest.mark.parametrize("overlap", [1.0, 3.0, math.inf])
def test_an_exact_denoiser_is_on_the_likelihood_along_every_path(overlap, make_config, make_model):
    """Groups that have nothing to do with each other: their prior alone."""
    config = make_config(2, 2, *CHAIN, "evaluate.noise_samples=16")
    model, given = make_model(config).eval(), batch(config, 2)
    model.head.output.weight.data.zero_()
    with torch.no_grad():
        exact = model(given).per_sample.double()
    mean, error = bounds(model, given, overlap, 300)
    assert ((mean - exact).abs() < 4 * error + 1e-3).all() and (error < 0.03 * exact).all()


def test_a_bound_leaves_no_more_than_all_probability(make_config, make_model, monkeypatch):
    """All 16 codes of a toy, on which the head is wrong: the sum of exp(-bound) is at most 1, of the chain it is 1."""
    toy = ["model.bits=4", "model.group_bits=2", "model.head.kind=chain", "diffusion.noisy_every=1"]
    config = make_config(1, 2, *toy, "evaluate.noise_samples=32")
    model = make_model(config, 16).eval()
    for weight in (model.head.output.weight, model.head.values):
        weight.data.mul_(2)
    # of the first token alone
    monkeypatch.setattr(model, "of_samples", lambda nats, _: BoundOutput.of(nats[0][:, None]))
    given = TokenBatch(torch.stack((torch.arange(16), torch.zeros(16, dtype=torch.int64)), 1), torch.arange(16))
    with torch.no_grad():
        exact = model(given).per_sample.double()
    assert (-exact).exp().sum() == pytest.approx(1, abs=1e-4)
    assert exact.std() > 0.3
    for overlap in (2.0, math.inf):
        mean, error = bounds(model, given, overlap, 100)
        total, slack = (-mean).exp().sum(), ((-mean).exp() * error).norm()
        assert 0.3 < total < 1 + 3 * slack and slack < 0.1


def test_every_block_sees_what_the_chain_sees_where_all_is_decided(make_config, make_model):
    config = make_config(3, 4, *CHAIN, "model.memory.rows=9")
    model, given = make_model(config).eval(), batch(config, 2)
    place = every_block(2, 4, 1, 0, 3, torch.device("cpu"))
    with torch.no_grad():
        hidden = model.hidden(given.tokens)
        come = torch.ones(4, 2, 9)
        noisy = model._noised(given, place, come, torch.randn(12, 2, 11))
        clean, again = model._evaluate(hidden, given, noisy).split(12)
        torch.testing.assert_close(again, clean, rtol=1e-5, atol=1e-5)
        come[1, 0, 3] = 0.5  # of one block; those behind it see the sequence
        noisy = model._noised(given, place, come, torch.randn(12, 2, 11))
        clean, again = model._evaluate(hidden, given, noisy).split(12)
    same = (clean - again).abs().amax(-1) < 1e-5
    assert same[:, 1].all() and same[[0, 1, 2, 3, 6, 7, 8, 9, 10, 11], 0].all() and not same[[4, 5], 0].any()
