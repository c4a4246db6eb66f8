"""The softmax peer against transformers' Qwen3 and Llama: cross-entropy, every gradient, and training steps."""

from __future__ import annotations

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from torch.func import functional_call

from megatron_bit.errors import UserError
from megatron_bit.model.build import build_model
from megatron_bit.model.chunk import TokenBatch
from megatron_bit.optim.build import build_optimizer
from megatron_bit.optim.schedule import learning_rate
from megatron_bit.parallel.dims import ParallelDims
from megatron_bit.parallel.logical import VOCABULARY, pieces
from megatron_bit.training.step import forward_backward

VOCAB_SIZE, PADDED, EOS = 301, 384, 7
SOFTMAX = "model.head.kind=softmax"


def build(config, groups):
    (model,) = build_model(config, VOCAB_SIZE, groups, EOS)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            if name in VOCABULARY:
                noise[VOCAB_SIZE:] = 0
            parameter.add_(noise)
    return model


def batch(length, size=3, seed=0):
    tokens = torch.randint(0, VOCAB_SIZE, (size, length), generator=torch.Generator().manual_seed(seed))
    return TokenBatch(tokens, torch.arange(size))


def logical(model, groups, values):
    return {
        part.name: part.of(values[name]).detach().clone()
        for name, parts in pieces(model, groups).items()
        for part in parts
    }


class Peer:
    """transformers' model as a function of our logical tensors."""

    def __init__(self, config, weights):
        import transformers

        self.m = m = config.model
        kind = "Qwen3" if m.qk_norm else "Llama"
        settings = getattr(transformers, f"{kind}Config")(
            vocab_size=VOCAB_SIZE, hidden_size=m.hidden_size, intermediate_size=m.ffn_hidden_size,
            num_hidden_layers=m.num_layers, num_attention_heads=m.num_heads, num_key_value_heads=m.num_kv_heads,
            head_dim=m.hidden_size // m.num_heads, rms_norm_eps=m.norm_eps, rope_theta=m.rope_base,
            attn_implementation="eager",
        )  # fmt: skip
        self.model = getattr(transformers, f"{kind}ForCausalLM")(settings)
        self.weights = {name: w.clone().requires_grad_() for name, w in weights.items()}

    def named(self):
        m, w = self.m, self.weights
        out = {
            "model.embed_tokens.weight": w["embedding.table.weight"][:VOCAB_SIZE],
            "lm_head.weight": w["head.logits.weight"][:VOCAB_SIZE],
            "model.norm.weight": w["backbone.final_layernorm.weight"],
        }
        dim, queries = m.hidden_size // m.num_heads, m.num_heads // m.num_kv_heads
        for i in range(m.num_layers):
            ours, theirs = f"backbone.layers.{i}.", f"model.layers.{i}."
            fused = w[f"{ours}self_attention.linear_qkv.weight"].view(m.num_kv_heads, queries + 2, dim, -1)
            for letter, rows in (("q", fused[:, :queries]), ("k", fused[:, queries]), ("v", fused[:, queries + 1])):
                out[f"{theirs}self_attn.{letter}_proj.weight"] = rows.reshape(-1, m.hidden_size)
            if m.qk_norm:
                for letter in "qk":
                    norm = w[f"{ours}self_attention.{letter}_layernorm.weight"]
                    out[f"{theirs}self_attn.{letter}_norm.weight"] = norm
            for name, other in (
                ("self_attention.linear_proj", "self_attn.o_proj"),
                ("input_layernorm", "input_layernorm"),
                ("pre_mlp_layernorm", "post_attention_layernorm"),
                ("mlp.linear_fc1.gate", "mlp.gate_proj"),
                ("mlp.linear_fc1.up", "mlp.up_proj"),
                ("mlp.linear_fc2", "mlp.down_proj"),
            ):
                out[f"{theirs}{other}.weight"] = w[f"{ours}{name}.weight"]
        return out

    def remembered(self, tokens):
        """[b, S, D]: the hashed n-grams that end before each token."""
        m, out = self.m, torch.zeros(*tokens.shape, self.m.hidden_size)
        keys = [[reference.hash_values([token]) for token in row] for row in tokens.tolist()]
        for i, order in enumerate(m.memory.orders if m.memory.rows else ()):
            for b, row in enumerate(keys):
                for p in range(order, len(row)):
                    key = sum(row[p - 1 - j] * reference.hash_factor(1, j) for j in range(order))
                    place = (reference.splitmix(key + reference.hash_factor(2, i)) % 2**63) % m.memory.rows
                    out[b, p] = out[b, p] + self.weights["embedding.memory.table"][i * m.memory.rows + place]
        return out

    def nats(self, tokens):
        """[b, S]"""
        ids = torch.cat((torch.full_like(tokens[:, :1], EOS), tokens[:, :-1]), dim=1)
        named = self.named()
        assert named.keys() == dict(self.model.named_parameters()).keys()
        x = named["model.embed_tokens.weight"][ids] + self.remembered(tokens)
        logits = functional_call(self.model, named, (), {"inputs_embeds": x, "use_cache": False}).logits
        return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("attention", ["causal", "block_causal"])
@pytest.mark.parametrize("rows", [0, 9])
def test_loss_bound_and_every_gradient(groups, make_config, rows, qk_norm, attention):
    switches = (f"model.qk_norm={qk_norm}", f"model.attention={attention}", f"model.memory.rows={rows}")
    config = make_config(1, 13, SOFTMAX, *switches)
    model = build(config, groups)
    peer = Peer(config, logical(model, groups, dict(model.named_parameters())))
    data = batch(13)
    out = model(data)
    out.loss.backward()
    nats = peer.nats(data.tokens)
    nats.mean().backward()
    torch.testing.assert_close(out.metrics, nats.detach().mean().expand(2), rtol=1e-6, atol=0)
    for name, gradient in logical(model, groups, {n: p.grad for n, p in model.named_parameters()}).items():
        expected = peer.weights[name].grad
        assert expected.norm() > 1e-7, name
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name
        if name in VOCABULARY:
            assert gradient.shape[0] == PADDED and gradient[VOCAB_SIZE:].abs().max() == 0
    with torch.no_grad():
        bound = model.eval()(data)
    per_sample = nats.detach().mean(1)
    torch.testing.assert_close(bound.loss, per_sample.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(bound.per_sample, per_sample, rtol=1e-6, atol=0)


def test_the_probabilities_of_all_tokens_sum_to_one(groups, make_config):
    """And the padding has none, however large its rows: they are not even looked at."""
    model = build(make_config(1, 4, SOFTMAX), groups)
    hidden = torch.randn(4, 1, 36, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.head.logits.weight[VOCAB_SIZE:] = 50.0
        every = torch.arange(VOCAB_SIZE)[:, None].expand(-1, 4)
        total = sum(torch.exp(-model.head(hidden, ids[None])) for ids in every)
    torch.testing.assert_close(total, torch.ones(4, 1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("vocab_size", [1, 127, 128, 129])
def test_a_vocabulary_of_any_size(groups, make_config, vocab_size):
    config = make_config(1, 4, SOFTMAX)
    (model,) = build_model(config, vocab_size, groups, 0)
    rows = 256 if vocab_size > 128 else 128
    for name in VOCABULARY:
        weight = dict(model.named_parameters())[name].detach()
        assert weight.shape == (rows, 36)
        assert weight[vocab_size:].abs().sum() == 0 and weight[:vocab_size].abs().min() > 0
        assert weight[:vocab_size].std() == pytest.approx(config.model.init_std, rel=0.4)
    tokens = torch.randint(0, vocab_size, (2, 4))
    loss = model(TokenBatch(tokens, torch.arange(2))).loss.item()
    assert loss == pytest.approx(math.log(vocab_size), abs=0.5 if vocab_size > 1 else 1e-6)


def test_three_training_steps(groups, make_config, reference):
    """Against torch's AdamW on transformers' model, with clipping and the head's own rate: losses, norms, weights."""
    config = make_config(
        1, 6, SOFTMAX, "train.global_batch_size=4", "train.micro_batch_size=2", "train.steps=3", "optim.lr=5e-3",
        "optim.warmup_steps=2", "optim.head_lr_scale=2", "optim.grad_clip=0.5", "optim.eps=1e-6",
    )  # fmt: skip
    model = build(config, groups)
    peer = Peer(config, logical(model, groups, dict(model.named_parameters())))
    o = config.optim
    theirs = torch.optim.AdamW(
        [
            {"params": [w], "scale": 2.0 if name.startswith("head.") else 1.0, "weight_decay": 0.1 * (w.dim() > 1)}
            for name, w in peer.weights.items()
        ],
        betas=o.betas,
        eps=o.eps,
    )
    optimizer = build_optimizer(config, [model], groups)
    for step in range(3):
        batches = [batch(6, 2, seed=2 * step + i) for i in (0, 1)]
        loss, bound = forward_backward(batches, optimizer, groups).tolist()
        optimizer.step([learning_rate(config, step) * group["lr_scale"] for group in optimizer.base.param_groups])
        theirs.zero_grad()
        expected = torch.stack([peer.nats(b.tokens).mean() for b in batches]).mean()
        expected.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(peer.weights.values()), o.grad_clip)
        for group in theirs.param_groups:
            group["lr"] = o.lr * reference.schedule(config, step) * group["scale"]
        theirs.step()
        assert norm > 0.5
        assert loss == bound == pytest.approx(expected.item(), rel=1e-6)
        assert float(optimizer.grad_norm) == pytest.approx(norm.item(), rel=1e-5)
    for name, value in logical(model, groups, dict(model.named_parameters())).items():
        torch.testing.assert_close(value, peer.weights[name].detach(), rtol=1e-4, atol=1e-6, msg=name)
        if name in VOCABULARY:
            assert value[VOCAB_SIZE:].abs().max() == 0


def test_what_tp_allows(make_config):
    config = make_config(1, 12, SOFTMAX, "parallel.tp=3", "model.num_kv_heads=3", "model.head.num_heads=4")
    assert ParallelDims.build(config, 3).tp == 3  # the denoising head's sizes do not count
    assert ParallelDims.build(config.with_vocab_size(301), 3).tp == 3
    with pytest.raises(UserError, match=r"vocabulary of 421 tokens, padded to 512, cannot be split over parallel.tp 3"):
        ParallelDims.build(config.with_vocab_size(421), 3)
    pipeline = make_config(1, 12, SOFTMAX, "parallel.pp=3")
    with pytest.raises(UserError, match=r"model.num_layers 2 is too few .* use at most 2"):
        ParallelDims.build(pipeline, 3)
