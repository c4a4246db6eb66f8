"""The head: one block at a time, and nothing but the matched filter before training."""

import pytest
import torch
from mbit_kernels.matched_filter import posterior_logits

from megatron_bit.diffusion.noise import TRAIN, gaussian, stratified_levels
from megatron_bit.model.chunk import TokenBatch


def head_inputs(config, samples=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k, s, m = config.model.block_size, config.data.seq_length, config.diffusion.noise_samples
    z = torch.randn(s, samples, m, config.model.bits, generator=generator)
    log_sigma = torch.randn(s // k, samples, m, generator=generator)
    return z, log_sigma, torch.randn(s, samples, config.model.hidden_size, generator=generator)


@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("changed", ["z", "log_sigma", "hidden"])
def test_sees_its_own_block_sample_and_noise_draw(make_config, make_model, block_size, changed):
    """One changed input moves every token of its block (the head is bidirectional) and nothing outside of it."""
    config = make_config(block_size, 5)
    head = make_model(config).head
    z, log_sigma, hidden = head_inputs(config)
    with torch.no_grad():
        before = head(z, log_sigma, hidden)
        for block in (0, 1, 4):
            token = block * block_size + block_size // 2
            expected = torch.zeros(before.shape[:3], dtype=torch.bool)
            expected[block * block_size : (block + 1) * block_size, 1, 2 if changed != "hidden" else slice(None)] = True
            inputs = {"z": z.clone(), "log_sigma": log_sigma.clone(), "hidden": hidden.clone()}
            where = {"z": (token, 1, 2), "log_sigma": (block, 1, 2), "hidden": (token, 1)}[changed]
            inputs[changed][where] += 1.0
            assert torch.equal((head(**inputs) != before).any(-1), expected)


def test_is_not_symmetric_in_the_tokens_of_a_block(make_config, make_model):
    """Same bits and same condition at every place of a block: the learned positions tell the places apart."""
    config = make_config(3, 2)
    z, log_sigma, hidden = head_inputs(config)
    z, hidden = z[:1].expand(6, -1, -1, -1), hidden[:1].expand(6, -1, -1)
    out = make_model(config).head(z, log_sigma, hidden)
    assert not torch.allclose(out[0], out[1], atol=1e-4)


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_starts_as_the_matched_filter(make_config, make_model, block_size):
    config = make_config(block_size, 5)
    model = make_model(config, perturb=False)
    z, log_sigma, hidden = head_inputs(config)
    residual = model.head(z, log_sigma, hidden)
    sigma = log_sigma.exp().repeat_interleave(block_size, 0)[..., None]
    assert torch.count_nonzero(residual) == 0
    assert torch.equal(posterior_logits(residual, z, sigma), (2 * z / sigma**2).clamp(-30, 30))


def test_loss_of_the_untrained_model_in_closed_form(make_config, make_model):
    """Recomputed in float64 from the noise, through tanh."""
    config = make_config(3, 5)
    d, seed = config.diffusion, config.train.seed
    model = make_model(config, perturb=False)
    tokens = torch.randint(0, 1999, (2, 15), generator=torch.Generator().manual_seed(3))
    sample = torch.tensor([3, 5])
    out = model(TokenBatch(tokens, sample))
    sigma = model.noise.log_sigma(stratified_levels(seed, TRAIN, sample, 0, 5, d.noise_samples)).double().exp()
    sigma = sigma.repeat_interleave(3, 0)[..., None]
    x = model.codec.encode(tokens.t()).double()[:, :, None]
    z = x + sigma * gaussian(seed, TRAIN, sample, 0, 5, d.noise_samples, 3, config.model.bits)
    error = (x - torch.tanh(z / sigma**2)) ** 2
    torch.testing.assert_close(out.loss.double(), ((sigma**2 + 1) / sigma**2 * error).mean(), rtol=1e-5, atol=0)


def test_starts_with_a_gradient_at_the_output_only(make_config, make_model):
    """Zero output weights: the first update reaches them alone, as intended, and they have something to learn."""
    config = make_config(3, 5)
    model = make_model(config, perturb=False)
    tokens = torch.randint(0, 1999, (2, 15), generator=torch.Generator().manual_seed(3))
    model(TokenBatch(tokens, torch.arange(2))).loss.backward()
    moving = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moving == {"head.output.weight", "head.prior.weight", "head.prior_last.weight"}
