"""Converted folders, loaded by transformers where this project is not installed, against the model that trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_bit.diffusion import noise
from megatron_bit.inference.hf import noise_bitlm as hf_noise
from megatron_bit.model.chunk import TokenBatch

DIFFUSION = ["sharded_training", "k1", "k4", "odd", "groups", "direct", "logistic", "entropy_rate", "names_joint",
             "seeing"]  # fmt: skip
CHAINS = ["chain", "chain_k1", "names"]
FP32 = [*DIFFUSION, *CHAINS]


def difference(a: Tensor, b: Tensor, what: str) -> float:
    assert a.shape == b.shape
    worst = float((a - b).abs().max())
    print(f"{what}: largest difference {worst:.2e}, values up to {b.abs().max():.3g}")
    return worst


@pytest.mark.parametrize("name", CHAINS)
def test_states_of_a_chain(name, elsewhere, trainer, inputs):
    ours, tokens = trainer(name), inputs[name]["tokens"]
    states = ours.hidden(torch.cat((tokens, tokens[:, : ours.config.model.block_size]), dim=1))
    assert difference(elsewhere[f"{name}/states"], states, f"{name} states") < 1e-5


@pytest.mark.parametrize("name", DIFFUSION)
def test_states_and_log_odds(name, elsewhere, trainer, inputs):
    given, ours = inputs[name], trainer(name)
    k = ours.config.model.block_size
    tokens = given["tokens"]
    states = ours.hidden(torch.cat((tokens, tokens[:, :k]), dim=1))
    z = given["noisy_bits"].permute(1, 3, 0, 2, 4).flatten(0, 1)  # [s, b, M, B]
    with torch.no_grad():
        newest = ours.model._newest(TokenBatch(tokens, given["sample"]))
        level, rows = given["log_sigma"].transpose(0, 1), states[:, :-k].transpose(0, 1)
        residual = ours.model.head(z, level, rows, newest=newest)
    residual = residual.unflatten(0, (-1, k)).permute(2, 0, 3, 1, 4)
    assert residual.std() > 0.05, "the head has to say something"
    assert difference(elsewhere[f"{name}/states"], states, f"{name} states") < 1e-5
    assert difference(elsewhere[f"{name}/residual"], residual, f"{name} residual log-odds") < 1e-5


@pytest.mark.parametrize("name", FP32)
def test_score_is_the_bound_of_validation(name, elsewhere, trainer, inputs):
    given, ours = inputs[name], trainer(name)
    with torch.no_grad():
        found = ours.model(TokenBatch(given["tokens"], given["sample"]))
    nats = elsewhere[f"{name}/nats"]
    torch.testing.assert_close(elsewhere[f"{name}/nats_per_token"].sum(1), nats, rtol=1e-5, atol=0)
    mine = nats / given["tokens"].shape[1]
    torch.testing.assert_close(mine, found.per_sample, rtol=2e-6, atol=0)
    assert mine.min() > 0.5
    k = ours.config.model.block_size  # and by place in the block
    by_place = elsewhere[f"{name}/nats_per_token"].unflatten(1, (-1, k)).mean(1)
    torch.testing.assert_close(by_place, found.metrics.sum(-1), rtol=1e-5, atol=1e-6)


def test_bfloat16_is_close(elsewhere):
    full, half = elsewhere["odd/residual"], elsewhere["bf16/residual"]
    worst = difference(half, full, "bfloat16 residual")
    assert 1e-4 < worst < 0.05 * float(full.abs().max())
    torch.testing.assert_close(elsewhere["bf16/nats"], elsewhere["odd/nats"], rtol=0.01, atol=0)


@pytest.mark.parametrize("name", FP32)
def test_text_is_the_same_as_from_the_run(name, elsewhere, converted):
    """`megatron-bit generate RUN`, one prompt at a time, against a padded batch in transformers."""
    from megatron_bit.inference.generate import Generator

    generator = Generator(converted[name].run)
    for row, (prompt, sequence) in enumerate((("def f(", 40), ("import os, sys\nclass ", 2**40))):
        ids = torch.tensor([generator.text.encode(prompt)])
        how = {"steps": 6} if name in DIFFUSION else {}
        alone = generator.model.generate(ids, max_new_tokens=17, seed=5, sequence_ids=[sequence], **how)
        new = alone[0, ids.shape[1] :]
        assert torch.equal(elsewhere[f"{name}/text"][row, : len(new)], new)


def test_what_looks_like_a_control_token_is_text(elsewhere, converted):
    from megatron_bit.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(converted["odd"].data / "tokenizer.model")
    assert elsewhere["odd/special"][0].tolist() == tokenizer.encode("</s> a")


def test_noise_is_the_trainers():
    sample, seed = torch.tensor([3, 2**40 + 7]), 2**45 + 9
    block = torch.arange(5, 9).expand(2, -1)
    theirs = noise.gaussian(seed, noise.VALIDATION, sample, 5, 4, 3, 3, 7)  # [n K, b, M, B]
    mine = hf_noise.gaussian(seed, hf_noise.VALIDATION, sample, block, 3, 3, 7)
    assert torch.equal(mine.permute(1, 3, 0, 2, 4).flatten(0, 1), theirs)
    theirs = noise.stratified_levels(seed, noise.VALIDATION, sample, 5, 4, 3)
    assert torch.equal(hf_noise.stratified_levels(seed, hf_noise.VALIDATION, sample, block, 3).transpose(0, 1), theirs)
    assert (hf_noise.VALIDATION, hf_noise.SAMPLING, hf_noise.RECONSTRUCTION, hf_noise.LEVEL) == (
        noise.VALIDATION, noise.SAMPLING, noise.RECONSTRUCTION, noise._LEVEL,
    )  # fmt: skip
