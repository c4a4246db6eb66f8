"""What users of transformers pass to `generate`, and its pipeline."""

from __future__ import annotations

import pytest
import torch
from generation import tokens
from transformers import MaxLengthCriteria, StoppingCriteriaList, pipeline

IDS = torch.tensor([tokens(1, 8), tokens(2, 8)])
HOW = {"max_new_tokens": 12, "eos_token_id": []}


@pytest.mark.parametrize("name", ["chain", "names", "memory"])
def test_greedy_is_the_likeliest_token_of_the_logits(name, generator):
    """Of rows of several lengths, and beyond one block."""
    model = generator(name).model
    k = model.config.block_size
    rows = [tokens(1, k), tokens(2, 3 * k)]
    ids, mask = torch.full((2, 3 * k), 77), torch.zeros(2, 3 * k, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, 3 * k - len(row) :], mask[i, 3 * k - len(row) :] = torch.tensor(row), 1
    made = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=2 * k + 1, eos_token_id=[])
    for i, row in enumerate(rows):
        text = torch.tensor([[*row, *made[i, 3 * k :].tolist()]])
        likeliest = model(text).logits[0].argmax(-1)
        assert likeliest[len(row) - 1 : -1].tolist() == text[0, len(row) :].tolist()
    one = model.generate(ids, attention_mask=mask, top_k=1, max_new_tokens=2 * k + 1, eos_token_id=[])
    assert torch.equal(one, made)
    nearly = model.generate(ids, attention_mask=mask, top_p=1e-6, max_new_tokens=2 * k + 1, eos_token_id=[])
    assert torch.equal(nearly, made)


def test_what_is_left_out_is_not_drawn(generator):
    model = generator("names").model
    k = model.config.block_size
    ids = torch.tensor([tokens(1, k)]).expand(40, -1)
    made = model.generate(ids, top_k=3, max_new_tokens=1, eos_token_id=[], seed=1)[:, -1]
    best = model(ids[:1], logits_to_keep=1).logits[0, 0].topk(3).indices
    assert set(made.tolist()) == set(best.tolist())
    eos = int(best[0])
    late = model.generate(ids[:1], do_sample=False, min_new_tokens=3, max_new_tokens=8, eos_token_id=eos)
    assert eos not in late[0, k : k + 3].tolist()
    free = model.generate(ids[:1], do_sample=False, repetition_penalty=1e6, max_new_tokens=12, eos_token_id=[])[0]
    assert len(set(free[k:].tolist())) == 12 and not set(free[k:].tolist()) & set(free[:k].tolist())


@pytest.mark.parametrize("name", ["names", "odd"])
def test_a_seed_is_drawn(name, generator):
    model, ids = generator(name).model, torch.tensor([tokens(1, 6)])
    how = {"max_new_tokens": 12, "eos_token_id": []}
    assert not torch.equal(model.generate(ids, **how), model.generate(ids, **how))
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(model.generate(ids, **how, num_return_sequences=3, use_cache=True, num_beams=1))
    assert made[0].shape == (3, 18) and torch.equal(*made) and len({*map(tuple, made[0].tolist())}) == 3


@pytest.mark.parametrize("name", ["chain", "k4"])
def test_several_texts_for_a_prompt(name, generator):
    model = generator(name).model
    three = model.generate(IDS, num_return_sequences=3, seed=2, attention_mask=torch.ones_like(IDS), **HOW)
    assert torch.equal(three, model.generate(IDS.repeat_interleave(3, 0), seed=2, **HOW))
    assert len({tuple(row) for row in three.tolist()}) == 6


@pytest.mark.parametrize("name", ["chain", "k4"])
def test_stopping_criteria_end_rows(name, generator):
    """Behind the token for which one says so, each row by itself."""
    model = generator(name).model
    whole = model.generate(IDS, seed=3, **HOW)
    assert torch.equal(model.generate(IDS, seed=3, stopping_criteria=[MaxLengthCriteria(13)], **HOW), whole[:, :13])
    seen = []

    def third_of_the_first(ids, scores, **_):
        seen.append(ids.shape[1])
        return torch.tensor([ids.shape[1] == 11, False])

    found = model.generate(IDS, seed=3, pad_token_id=7, stopping_criteria=[third_of_the_first], **HOW)
    assert seen == list(range(9, 21))
    assert torch.equal(found[1], whole[1])
    assert torch.equal(found[0, :11], whole[0, :11]) and found[0, 11:].tolist() == [7] * 9


def test_criteria_stop(generator):
    ids = torch.tensor([tokens(1, 6), tokens(2, 6)])
    stops = StoppingCriteriaList([MaxLengthCriteria(11)])
    assert generator("odd").model.generate(ids, stopping_criteria=stops, eos_token_id=[]).shape == (2, 11)


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("odd", {"do_sample": False}, "do_sample"),
        ("odd", {"top_k": 5}, "top_k"),
        ("names", {"use_cache": False}, "use_cache"),
        ("names", {"top_p": 1.5}, "top_p=1.5"),
        ("names", {"top_k": 5, "overlap": 2}, "overlap"),
        ("names", {"num_return_sequences": 0}, "num_return_sequences=0"),
    ],
)
def test_what_cannot_be_meant_is_an_error(name, given, says, generator):
    with pytest.raises(ValueError, match=says):
        generator(name).model.generate(torch.tensor([[5]]), **given)


def test_the_pipeline(converted):
    whole = pipeline("text-generation", model=str(converted["names"].folder), trust_remote_code=True)
    made = whole("def f(", max_new_tokens=9)[0]["generated_text"]
    assert made.startswith("def f(") and len(made) > 6
    text = whole(["def f(", "import "], max_new_tokens=9, do_sample=True, top_p=0.9, top_k=50, temperature=0.8)
    assert [t[0]["generated_text"][:6] for t in text] == ["def f(", "import"]


def test_the_pipeline_of_a_joint_head_says_what_it_cannot_mean(converted):
    """transformers' pipeline has a temperature of its own, 0.7."""
    whole = pipeline("text-generation", model=str(converted["odd"].folder), trust_remote_code=True)
    with pytest.raises(ValueError, match="temperature means nothing"):
        whole("def f(", max_new_tokens=9)
