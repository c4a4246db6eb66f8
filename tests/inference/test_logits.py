"""`model(input_ids).logits` and the loss of labels, as users of transformers know them."""

from __future__ import annotations

import pytest
import torch
from generation import chain_of, tokens

from megatron_bit.inference.hf import logits_bitlm as hf_logits

CHAINS = ["chain", "chain_k1", "names", "memory"]


def batch(side, rows):
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 77), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


@pytest.mark.parametrize("name", CHAINS)
def test_logits_are_the_nats_of_score(name, generator, monkeypatch):
    model = generator(name).model
    k = model.config.block_size
    for prefixes, rows in ((256, 4096), (5, 16)):  # in slices of any size
        monkeypatch.setattr(hf_logits, "PREFIXES", prefixes)
        monkeypatch.setattr(hf_logits, "ROWS", rows)
        for length in (3 * k, 3 * k + 2):
            ids = torch.tensor([tokens(1, length), tokens(2, length)])
            logits = model(ids).logits
            assert logits.shape == (2, length, 421)
            nats = -logits[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
            expected = model.score(ids, blocks="start").nats_per_token[:, 1:]
            torch.testing.assert_close(nats, expected, rtol=1e-4, atol=1e-5)
            if length % k == 0:  # whole blocks: the nats of `evaluate`
                torch.testing.assert_close(expected, model.score(ids).nats_per_token[:, 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CHAINS)
def test_every_token_is_what_score_says_of_it(name, generator):
    """Not only those of the text: the last token replaced by any other."""
    model, row = generator(name).model, tokens(3, 10)
    other = torch.arange(0, 421, 13)
    texts = torch.cat((torch.tensor([row]).expand(len(other), -1), other[:, None]), dim=1)
    nats = model.score(texts, blocks="start").nats_per_token[:, -1]
    logits = model(torch.tensor([row]), logits_to_keep=1).logits
    assert logits.shape == (1, 1, 421)
    torch.testing.assert_close(-logits[0, 0, other], nats, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [[3, 3], [2, 2, 2], [1, 3, 2]])
def test_they_sum_to_one_over_all_codes(groups):
    model = chain_of(0, vocab_size=64, bits=6, group_sizes=groups, block_size=2, head_window=3)
    logits = model(torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))).logits
    torch.testing.assert_close(logits.logsumexp(-1), torch.zeros(2, 7), rtol=0, atol=1e-5)
    assert logits.std(-1).min() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_and_a_prefix_have_their_own(side, generator):
    model, rows = generator("names").model, [tokens(4, 5), tokens(5, 13)]
    ids, mask = batch(side, rows)
    logits = model(ids, attention_mask=mask).logits
    for i, row in enumerate(rows):
        own = logits[i][mask[i].bool()]
        torch.testing.assert_close(own, model(torch.tensor([row])).logits[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own[:3], model(torch.tensor([row[:3]])).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_the_mean_of_the_labels(side, generator):
    model, rows = generator("memory").model, [tokens(6, 6), tokens(7, 11)]
    ids, mask = batch(side, rows)
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    assert out.logits is None
    alone = [
        -model(torch.tensor([r])).logits[0, :-1].gather(-1, torch.tensor(r[1:])[:, None]).squeeze(-1) for r in rows
    ]
    torch.testing.assert_close(out.loss, torch.cat(alone).mean(), rtol=1e-4, atol=0)
    labels[1, -4:] = -100
    some = model(ids, attention_mask=mask, labels=labels, output_logits=True)
    assert some.logits is not None and some.loss != out.loss
    with pytest.raises(ValueError, match="-100"):
        model(ids, labels=ids + 1)


def test_what_has_no_logits_says_so(generator):
    model, ids = generator("odd").model, torch.tensor([tokens(1, 8)])
    for given in ({}, {"labels": ids}):
        with pytest.raises(ValueError, match="`score`"):
            model(ids, **given)
    assert model(ids, output_logits=False).last_hidden_state is not None
    with pytest.raises(ValueError, match="blocks='start'"):
        model.score(ids, blocks="start")
    with pytest.raises(ValueError, match="trained at"):
        generator("chain").model(torch.zeros(1, 37, dtype=torch.int64))
