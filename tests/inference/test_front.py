"""Chains that have learned from noisy blocks: bounds and text along a front of noise."""

from __future__ import annotations

import json
import math

import pytest
import torch
from generation import chain_of, generate, tokens

from megatron_bit.cli import main
from megatron_bit.inference.generate import Generator
from megatron_bit.inference.hf import bits_bitlm as hf_bits
from megatron_bit.inference.hf import head_bitlm as hf_head
from megatron_bit.model.chunk import TokenBatch

NOISY = ["names", "memory"]


@pytest.mark.parametrize("overlap", [1.0, 2.5, math.inf])
@pytest.mark.parametrize("name", NOISY)
def test_the_bound_is_the_trainers(name, overlap, generator, trainer, inputs):
    """Block by block with a cache, against all blocks at once."""
    given, ours = inputs[name], trainer(name)
    with torch.no_grad():
        hidden = ours.model.hidden(given["tokens"])
        bound = ours.model.front_bound(hidden, TokenBatch(given["tokens"], given["sample"]), overlap).per_sample
    how = {"noise_samples": 3, "seed": 11, "sequence_ids": given["sample"], "overlap": overlap}
    score = generator(name).model.score(given["tokens"], **how)
    torch.testing.assert_close(score.nats / given["tokens"].shape[1], bound, rtol=1e-5, atol=0)
    exact = generator(name).model.score(given["tokens"])
    assert not torch.allclose(score.nats, exact.nats, rtol=1e-3)


@pytest.mark.parametrize("name", NOISY)
def test_a_padded_row_has_its_own_bound(name, generator):
    model, row = generator(name).model, torch.tensor([tokens(3, 14)])
    how = {"noise_samples": 2, "seed": 4, "overlap": 3.0}
    alone = model.score(row, sequence_ids=torch.tensor([8]), **how)
    padded = torch.cat((torch.full((1, 9), 77), row), dim=1)
    both = torch.cat((torch.tensor([tokens(4, 23)]), padded))
    mask = torch.ones_like(both)
    mask[1, :9] = 0
    batch = model.score(both, mask, sequence_ids=torch.tensor([1, 8]), **how)
    torch.testing.assert_close(batch.nats[1:], alone.nats, rtol=1e-5, atol=0)
    torch.testing.assert_close(batch.nats_per_token[1, 9:], alone.nats_per_token[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("name", NOISY)
def test_a_front_of_one_group_is_the_chain(name, temperature, guidance, generator):
    """As many evaluations as groups, each of one group that nothing is known of: the very same text."""
    how = {"temperature": temperature, "guidance": guidance, "seed": 3, "steps": None}
    prompts = [tokens(1, 7), tokens(2, 30)]
    chain = generate(generator(name), prompts, 18, **how)
    assert generate(generator(name), prompts, 18, overlap=1, **how) == chain


@pytest.mark.parametrize(("overlap", "steps"), [(2, 7), (math.inf, 3)])
@pytest.mark.parametrize("name", NOISY)
def test_text_of_a_row_is_its_own(name, overlap, steps, generator):
    """Across two contexts."""
    how = {"overlap": overlap, "steps": steps, "temperature": 0.8}
    prompts = [tokens(5, 25), tokens(6, 16), []]
    together = generate(generator(name), prompts, 20, sequence_ids=[4, 9, 2], **how)
    for prompt, sequence, made in zip(prompts, (4, 9, 2), together, strict=True):
        assert generate(generator(name), [prompt], 20, sequence_ids=[sequence], **how) == [made]
    other = generate(generator(name), prompts, 20, sequence_ids=[4, 9, 2], **{**how, "steps": steps + 1})
    assert other != together and max(map(max, together)) < 421


def test_steps_are_evaluations_of_the_head(generator, monkeypatch):
    counted, inner = [], hf_head.BitLMHead.groups
    monkeypatch.setattr(hf_head.BitLMHead, "groups", lambda *given: counted.append(1) or inner(*given))
    k = generator("names").model.config.block_size
    generate(generator("names"), [[]], 5 * k, overlap=math.inf, steps=3)
    read = len(generator("names").model.config.group_sizes)  # of no tokens yet, a group after the other
    assert len(counted) == 5 * (3 + 1) + read  # and one of each block as it is, for those behind


@pytest.mark.parametrize(("overlap", "steps"), [(math.inf, 1), (math.inf, 5), (2.5, 7)])
def test_noise_is_undone(overlap, steps):
    """Groups that have nothing to do with each other are drawn by the prior, however their noise falls."""
    model = chain_of(0, vocab_size=64, bits=6, group_sizes=[3, 3], block_size=2, head_window=3, noisy_blocks=True)
    model.head.out_proj.weight.data.zero_()
    rows = 6000
    made = model.generate(
        torch.zeros(rows, 0, dtype=torch.int64), overlap=overlap, steps=steps, max_new_tokens=2, eos_token_id=[]
    )
    values = hf_bits.group_values(model.config, model.model.bits(made))  # [rows, K, G]
    with torch.no_grad():
        states = model._states(made[:1], torch.zeros(1, dtype=torch.int64))[:, :2, None].transpose(1, 2)
        expected = model.head.of_block("prior", states)[0, 0].unflatten(-1, (2, 8)).softmax(-1)
    assert expected.max() > 0.3
    found = torch.nn.functional.one_hot(values, 8).double().mean(0)
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / rows).sqrt() + 1e-9).all()


def test_the_commands(converted, generator, monkeypatch, capsys):
    """`evaluate` bounds and draws along the front, `generate` draws the same text as `transformers` does."""
    names, chain = str(converted["names"].run), str(converted["chain"].run)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["megatron-bit", *words])
        try:
            main()
        except SystemExit as end:
            if end.code:
                return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    code, said = run("generate", names, "--prompt", "def f(", "--max-tokens", "12", "--overlap", "2.5", "--json")
    made = Generator(converted["names"].run)
    ids = made.text.encode("def f(")
    expected = made.model.generate(torch.tensor([ids]), max_new_tokens=12, seed=0, overlap=2.5, sequence_ids=[0])
    assert code == 0 and json.loads(said)["text"] == made.text.decoder.behind(ids, expected[0, len(ids) :].tolist())
    few = ("--samples", "4", "--json", "--overlap")
    code, said = run("evaluate", names, *few, "inf", "--noise-samples", "3", "--max-passes", "2")
    wide = json.loads(said)["likelihood"]
    assert code == 0 and not wide["exact"] and wide["noise_standard_error"] > 0 and wide["passes"] == 2
    code, said = run("evaluate", names, "--samples", "4", "--json")
    exact = json.loads(said)["likelihood"]
    assert exact["exact"] and exact["nats_per_token"] != wide["nats_per_token"]
    for words, wrong in (
        (("generate", chain, "--prompt", "x", "--overlap", "2"), "overlap 2 needs a chain trained with"),
        (("generate", names, "--prompt", "x", "--overlap", "0.5"), "--overlap 0.5 has to be 1 or above, or inf"),
        (("generate", names, "--prompt", "x", "--steps", "4"), "steps 4 of a chain are those of a front"),
        (("evaluate", chain, *few, "2"), "overlap 2 needs a chain trained with"),
        (("evaluate", names, *few, "nan"), "--overlap nan has to be 1 or above, or inf"),
    ):
        code, said = run(*words)
        assert code == 2 and wrong in said and said.count("\n") == 1, said


def test_refusals(generator):
    with pytest.raises(ValueError, match=r"overlap=2 needs a chain trained with diffusion.noisy_every above 0"):
        generate(generator("chain"), [[5]], 4, steps=None, overlap=2)
    with pytest.raises(ValueError, match=r"overlap=2 needs a chain trained with"):
        generator("chain").model.score(torch.tensor([[5]]), overlap=2)
    with pytest.raises(ValueError, match=r"overlap means nothing to a BitLM with a diffusion head"):
        generate(generator("k4"), [[5]], 4, overlap=2)
    with pytest.raises(ValueError, match=r"overlap=0.5 has to be 0 .* or 1 or above"):
        generate(generator("names"), [[5]], 4, steps=None, overlap=0.5)
    with pytest.raises(ValueError, match=r"overlap=nan has to be 1 or above, or inf"):
        generator("names").model.score(torch.tensor([[5]]), overlap=math.nan)
    with pytest.raises(ValueError, match=r"ahead=2 guesses what a chain draws, and overlap=3 is none"):
        generate(generator("names"), [[5]], 4, steps=None, overlap=3, ahead=2)
    with pytest.raises(ValueError, match=r"steps means nothing to a BitLM with a chain head"):
        generate(generator("names"), [[5]], 4, steps=4)
    with pytest.raises(ValueError, match=r"steps=0 has to be at least 1"):
        generate(generator("names"), [[5]], 4, steps=0, overlap=3)


def test_serve_draws_along_a_front(generator):
    from starlette.testclient import TestClient

    from megatron_bit.inference import serve

    served = serve.Server(generator("names"), "noisy", 1, 1, serve.Limits())
    with TestClient(served.app, base_url="http://localhost") as client:

        def ask(**body):
            body = {"model": "noisy", "prompt": "def f(", "max_tokens": 12, "seed": 3, **body}
            return client.post("/v1/completions", json=body)

        for how in ({"overlap": 1}, {"overlap": 2.5, "steps": 6}):
            want = generator("names").generate(["def f("], 12, seed=3, **how)[0]
            assert ask(**how).json()["choices"][0]["text"] == want["text"]
        for bad, said in (({"overlap": 0.5}, "overlap = '0.5'"), ({"steps": 1}, "steps 1 is for overlap")):
            answer = ask(**bad)
            assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text
