"""`generate` as users of transformers call it: fresh seeds, greedy, several texts, stopping criteria."""

from __future__ import annotations

import pytest
import torch
from generation import tokens
from transformers import MaxLengthCriteria, set_seed

IDS = torch.tensor([tokens(1, 8), tokens(2, 8)])
HOW = {"max_new_tokens": 12, "eos_token_id": []}


@pytest.mark.parametrize("name", ["chain", "k4"])
def test_a_seed_is_fresh_unless_one_is_given(name, generator):
    model = generator(name).model
    texts = [model.generate(IDS, **HOW) for _ in range(3)]
    assert not any(torch.equal(texts[i], texts[i + 1]) for i in range(2))
    again = []
    for _ in range(2):
        set_seed(5)
        again.append(model.generate(IDS, **HOW))
    assert torch.equal(*again)
    assert torch.equal(model.generate(IDS, seed=4, **HOW), model.generate(IDS, seed=4, **HOW))


def test_greedy_is_greedy(generator):
    model = generator("chain").model
    greedy = model.generate(IDS, do_sample=False, **HOW)
    assert torch.equal(greedy, model.generate(IDS, temperature=0.0, **HOW))
    assert torch.equal(greedy, model.generate(IDS, temperature=0.7, do_sample=False, **HOW))
    assert torch.equal(greedy, model.generate(IDS, do_sample=False, seed=8, **HOW))
    sampled = model.generate(IDS, do_sample=True, seed=8, **HOW)
    assert torch.equal(sampled, model.generate(IDS, seed=8, **HOW)) and not torch.equal(sampled, greedy)


@pytest.mark.parametrize("name", ["chain", "k4"])
def test_several_texts_for_a_prompt(name, generator):
    model = generator(name).model
    three = model.generate(IDS, num_return_sequences=3, seed=2, attention_mask=torch.ones_like(IDS), **HOW)
    assert torch.equal(three, model.generate(IDS.repeat_interleave(3, 0), seed=2, **HOW))
    assert len({tuple(row) for row in three.tolist()}) == 6
    with pytest.raises(ValueError, match="num_return_sequences=-1 has to be at least 1"):
        model.generate(IDS, num_return_sequences=-1, **HOW)


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


@pytest.mark.parametrize("name", ["chain", "k4"])
def test_what_changes_nothing_is_taken_and_what_would_is_not(name, generator):
    model = generator(name).model
    neutral = {
        "top_p": 1.0,
        "top_k": 0,
        "num_beams": 1,
        "use_cache": True,
        "repetition_penalty": 1.0,
        "max_length": None,
    }
    assert torch.equal(model.generate(IDS, seed=1, **neutral, **HOW), model.generate(IDS, seed=1, **HOW))
    other = {"top_p": 0.9, "top_k": 50, "num_beams": 2, "use_cache": False, "repetition_penalty": 1.1}
    if name != "chain":
        other["do_sample"] = False
    for key, value in other.items():
        with pytest.raises(ValueError, match=f"{key} means nothing to a BitLM"):
            model.generate(IDS, **{key: value}, **HOW)
