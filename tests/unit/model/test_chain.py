"""The chain head: a probability distribution over blocks, and who may see whom."""

import itertools

import pytest
import torch

from megatron_bit.model.chunk import TokenBatch


def of(tokens):
    return TokenBatch(tokens, torch.arange(len(tokens)))


@pytest.mark.parametrize("group_bits", [1, 2, 3])
def test_probabilities_of_all_blocks_sum_to_one(make_config, make_model, group_bits):
    """All 64 values of the second block, after the same first one."""
    config = make_config(2, 2, "model.bits=3", f"model.group_bits={group_bits}", "model.head.kind=chain")
    model = make_model(config, vocab_size=8)
    rows = torch.tensor([(5, 2, *block) for block in itertools.product(range(8), repeat=2)])
    with torch.no_grad():
        nats = model._evaluate(model.hidden(rows), of(rows)).sum(-1)  # [4, 64]
    assert nats[2:].sum(0).neg().exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert nats[:2].std(1).max() < 1e-6 < nats[2:].std(1).min()


@pytest.mark.parametrize("group_bits", [4, 10])
def test_a_token_knows_the_tokens_before_it_alone(make_config, make_model, group_bits):
    """Changing token p changes the nats of p and of every later token; in a block it reaches the next one directly."""
    config = make_config(3, 4, "model.head.kind=chain", f"model.group_bits={group_bits}")
    model = make_model(config)
    tokens = torch.randint(0, 1024, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model._evaluate(model.hidden(tokens), of(tokens)).sum(-1)
        for position in range(12):
            changed = tokens.clone()
            changed[0, position] ^= 0b100000001
            moved = (model._evaluate(model.hidden(changed), of(changed)).sum(-1) != before)[:, 0]
            assert moved.tolist() == [p >= position for p in range(12)], position


def test_loss_and_bound_are_the_same_number_and_need_no_noise(make_config, make_model):
    config = make_config(3, 5, "model.head.kind=chain", "model.group_bits=4", "diffusion.noisy_every=0")
    model = make_model(config)
    tokens = torch.randint(0, 1999, (2, 15), generator=torch.Generator().manual_seed(1))
    outputs = [model(TokenBatch(tokens, torch.tensor(sample))) for sample in ([0, 1], [7, 8])]
    assert torch.equal(outputs[0].metrics, outputs[1].metrics)
    assert outputs[0].metrics[0] == outputs[0].metrics[1]
    model.eval()
    found = model(TokenBatch(tokens, torch.arange(2)))
    bounds = found.per_sample
    apart = model._evaluate(model.hidden(tokens), of(tokens)).unflatten(0, (5, 3)).mean(0).transpose(0, 1)
    torch.testing.assert_close(found.metrics, apart)
    assert apart.shape == (2, 3, 3) and apart.flatten().unique().numel() == 18
    assert bounds.shape == (2,) and bounds.mean().item() == pytest.approx(outputs[0].metrics[0].item(), rel=1e-5)
