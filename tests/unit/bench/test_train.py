"""`bench train` times what it says: the peers do the same work, and the numbers hang together."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import world

from megatron_bit.bench import train
from megatron_bit.bench.gpt_peer import GPTPeer
from megatron_bit.commands.training import bench_train
from megatron_bit.config import load_config
from megatron_bit.errors import UserError
from megatron_bit.model.build import build_model
from megatron_bit.model.chunk import TokenBatch
from megatron_bit.parallel.split import train_flops
from megatron_bit.planning.parameters import parameter_counts

TINY = [
    "model.num_layers=2", "data.seq_length=24", "train.global_batch_size=4", "train.micro_batch_size=2",
    "model.bits=7", "model.group_bits=4",
]  # fmt: skip
NAMES = {
    "embedding.memory.": "memory.",
    "embedding.table.": "model.embedding.word_embeddings.",
    "backbone.block.": "model.decoder.",
    "head.logits.": "model.output_layer.",
}


@pytest.mark.parametrize("more", ["model.qk_norm=true", "model.qk_norm=false", "model.memory.rows=40"])
def test_the_gpt_model_is_the_softmax_model(more: str) -> None:
    """With the same weights both give the same loss and gradients, so they do the same work."""
    config = load_config(preset="laptop", overrides=[*TINY, more])
    config = train._softmax(config, 384)
    groups = world.of_one()
    ours, theirs = build_model(config, 384, groups, train.EOS)[0], GPTPeer(config, groups)
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    pairs = {name: next(new + name[len(old) :] for old, new in NAMES.items() if name.startswith(old)) for name in mine}
    assert sorted(pairs.values()) == sorted(other)
    with torch.no_grad():
        for name, parameter in mine.items():
            other[pairs[name]].copy_(parameter.normal_(std=0.1) if parameter.dim() > 1 else parameter)
    tokens = torch.randint(0, 384, (2, 24))
    tokens[:, -1] = train.EOS  # which GPTPeer has before the first token
    losses = []
    for model in (ours, theirs):
        output: Any = model(TokenBatch(tokens, torch.arange(2)))
        output.loss.backward()
        losses.append(output.loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, parameter in mine.items():
        gradient: Any = other[pairs[name]].grad
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_rows(capsys: pytest.CaptureFixture[str]) -> None:
    bench_train(tuple(TINY), vocab_size=(100, 300), precision=("fp32", "bf16"), steps=1, repeats=2, json=True)
    result = json.loads(capsys.readouterr().out)
    names = ["BitLM", "softmax 100", "softmax 300", "GPTModel 100"]
    assert [(r["precision"], r["model"]) for r in result["rows"]] == [(p, n) for p in ("fp32", "bf16") for n in names]
    rows = {(r["precision"], r["model"]): r for r in result["rows"]}
    config = load_config(preset="laptop", overrides=TINY)
    assert rows["fp32", "BitLM"]["flops_per_token"] == train_flops(config)
    softmax, larger, gpt = (rows["fp32", name] for name in names[1:])
    assert softmax["parameters"] == gpt["parameters"] == larger["parameters"] - 2 * 256 * (384 - 128)
    assert gpt["times GPTModel"]["median"] == 1
    for row in result["rows"]:
        assert row["mfu"] is None and row["kept_by_autograd_bytes"] > 0
        rate = row["tokens_per_second"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert row["model_flops_per_second"]["median"] == pytest.approx(
            rate["median"] * row["flops_per_token"], rel=0.5
        )
    assert larger["kept_by_autograd_bytes"] > softmax["kept_by_autograd_bytes"]
    assert rows["bf16", "softmax 100"]["kept_by_autograd_bytes"] < softmax["kept_by_autograd_bytes"]
    assert "times GPTModel" in train._table(result)


def test_variants(capsys: pytest.CaptureFixture[str]) -> None:
    """Each is a BitLM of its own, timed against the one that they differ from."""
    plain, memory = "model.names=sum model.head.prior_rank=0", "model.memory.rows=64"
    bench_train(tuple(TINY), vocab_size=(100,), also=(plain, memory), steps=1, repeats=2, json=True)
    result = json.loads(capsys.readouterr().out)
    assert [r["model"] for r in result["rows"]] == ["BitLM", plain, memory, "softmax 100", "GPTModel 100"]
    rows = {r["model"]: r for r in result["rows"]}
    for name, more in {"BitLM": [], plain: plain.split(), memory: [memory]}.items():
        config = load_config(preset="laptop", overrides=[*TINY, *more])
        assert rows[name]["parameters"] == sum(parameter_counts(config).values())
        assert rows[name]["flops_per_token"] == train_flops(config)
    assert rows["BitLM"]["times BitLM"]["median"] == 1 and rows[plain]["times BitLM"]["median"] > 0
    assert "times BitLM" in train._table(result) and plain in train._table(result)


def test_a_precision_that_the_peer_has_not_is_said() -> None:
    config = load_config(preset="laptop", overrides=TINY)
    narrow = config.model_copy(update={"train": config.train.model_copy(update={"precision": "fp8"})})
    groups = world.of_one()
    with pytest.raises(UserError, match=r"GPTModel does not have train\.precision fp8"):
        GPTPeer(train._softmax(narrow, 100), groups)


def test_bad_input() -> None:
    with pytest.raises(UserError, match=r"--vocab-size, --steps and --repeats need numbers of at least 1"):
        bench_train(vocab_size=(0,))
    with pytest.raises(UserError, match=r"--also 'train.micro_batch_size=1' has to keep to the keys of model and diff"):
        bench_train(also=("train.micro_batch_size=1",))
    with pytest.raises(UserError, match=r"train.precision = 'fp9'"):
        bench_train(precision=("fp9",))
