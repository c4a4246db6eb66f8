"""What makes two models and two runs the same: every key is of one kind, and has the effect that its kind says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_bit.config import leaves, load_config
from megatron_bit.data.corpus import Corpus
from megatron_bit.data.manifest import Manifest, Split
from megatron_bit.errors import UserError
from megatron_bit.run.identity import (
    KINDS,
    SHOWN,
    TOLD,
    Kind,
    compare_model,
    compare_run,
    identity,
    meaning,
    model_of,
    of_checkpoint,
    of_folder,
)

DIFFUSION = ["model.head.kind=diffusion", "model.group_bits=4", "model.bits=12"]
CHAIN = ["model.head.kind=chain", "model.group_bits=4", "model.bits=12"]

# a value that is another one than with DIFFUSION, and what has to be set beside it
ANOTHER: dict[str, list[str]] = {
    "run": ["run=elsewhere"],
    "model.bits": ["model.bits=11"],
    "model.code": ["model.code=gray"],
    "model.group_bits": ["model.group_bits=3"],
    "model.vocab_size": ["model.vocab_size=300"],
    "model.block_size": ["model.block_size=2"],
    "model.attention": ["model.attention=block_causal"],
    "model.num_layers": ["model.num_layers=5"],
    "model.hidden_size": ["model.hidden_size=128", "model.head_dim=64"],
    "model.num_heads": ["model.num_heads=8", "model.head_dim=64"],
    "model.num_kv_heads": ["model.num_kv_heads=4"],
    "model.head_dim": ["model.head_dim=32"],
    "model.ffn_hidden_size": ["model.ffn_hidden_size=512"],
    "model.qk_norm": ["model.qk_norm=false"],
    "model.rope_base": ["model.rope_base=500"],
    "model.norm_eps": ["model.norm_eps=1e-6"],
    "model.init_std": ["model.init_std=0.03"],
    "model.head.kind": ["model.head.kind=chain"],
    "model.names": ["model.names=pairs"],
    "model.head.prior_rank": ["model.head.prior_rank=8"],
    "diffusion.levels_apart": ["diffusion.levels_apart=2"],
    "diffusion.noisy_every": ["model.head.kind=chain", "diffusion.noisy_every=2"],
    "model.head.token_before": ["model.head.token_before=true"],
    "model.head.soft_prior": ["model.head.soft_prior=true"],
    "model.memory.rows": ["model.memory.rows=64"],
    "model.memory.orders": ["model.memory.orders=[3,1]"],
    "model.memory.hashes": ["model.memory.hashes=2"],
    "model.head.window": ["model.head.window=4"],
    "model.head.prior": ["model.head.prior=false"],
    "model.head.num_layers": ["model.head.num_layers=3"],
    "model.head.hidden_size": ["model.head.hidden_size=128"],
    "model.head.num_heads": ["model.head.num_heads=8"],
    "model.head.ffn_hidden_size": ["model.head.ffn_hidden_size=512"],
    "diffusion.loss": ["diffusion.loss=mse"],
    "diffusion.parameterization": ["diffusion.parameterization=direct"],
    "diffusion.noise_samples": ["diffusion.noise_samples=2"],
    "diffusion.sigma_min": ["diffusion.sigma_min=0.2"],
    "diffusion.sigma_max": ["diffusion.sigma_max=80"],
    "diffusion.noise": ["diffusion.noise=logistic"],
    "diffusion.noise_warmup": ["diffusion.noise_warmup=10"],
    "diffusion.log_mean": ["diffusion.log_mean=-1"],
    "diffusion.log_std": ["diffusion.log_std=1"],
    "diffusion.context_noise": ["diffusion.context_noise=0.1"],
    "diffusion.condition_drop": ["diffusion.condition_drop=0.1"],
    "diffusion.self_condition": ["diffusion.self_condition=0.5"],
    "parallel.tp": ["parallel.tp=2"],
    "parallel.pp": ["parallel.pp=2"],
    "parallel.vpp": ["parallel.vpp=2", "parallel.pp=2"],
    "parallel.sequence_parallel": ["parallel.sequence_parallel=false"],
    "parallel.zero_stage": ["parallel.zero_stage=1"],
    "parallel.recompute": ["parallel.recompute=full"],
    "parallel.timeout_minutes": ["parallel.timeout_minutes=3"],
    "optim.lr": ["optim.lr=1"],
    "optim.head_lr_scale": ["optim.head_lr_scale=2"],
    "optim.betas": ["optim.betas=[0.8, 0.9]"],
    "optim.eps": ["optim.eps=1e-5"],
    "optim.weight_decay": ["optim.weight_decay=0"],
    "optim.grad_clip": ["optim.grad_clip=0"],
    "optim.schedule": ["optim.schedule=wsd"],
    "optim.warmup_steps": ["optim.warmup_steps=3"],
    "optim.decay_fraction": ["optim.decay_fraction=0.5"],
    "optim.min_lr_ratio": ["optim.min_lr_ratio=0.5"],
    "optim.ema_decay": ["optim.ema_decay=0.9"],
    "optim.spike_guard": ["optim.spike_guard=3"],
    "optim.max_skipped": ["optim.max_skipped=3"],
    "optim.on_divergence": ["optim.on_divergence=rewind"],
    "optim.max_rewinds": ["optim.max_rewinds=1"],
    "data.path": ["data.path=elsewhere"],
    "data.sources": ["data.sources=[{path: a}, {path: b}]"],
    "data.temperature": ["data.temperature=2", "data.sources=[{path: a}, {path: b}]"],
    "data.seq_length": ["data.seq_length=128"],
    "data.shuffle_shards": ["data.shuffle_shards=4"],
    "data.document_boundaries": ["data.document_boundaries=positions"],
    "data.align_blocks": ["data.align_blocks=true"],
    "data.on_error": ["data.on_error=skip"],
    "data.prefetch": ["data.prefetch=1"],
    "data.verify": ["data.verify=always"],
    "data.remote.cache": ["data.remote.cache=cache"],
    "data.remote.cache_gib": ["data.remote.cache_gib=1"],
    "data.remote.attempts": ["data.remote.attempts=1"],
    "data.remote.timeout_seconds": ["data.remote.timeout_seconds=1"],
    "data.remote.workers": ["data.remote.workers=1"],
    "train.steps": ["train.steps=3"],
    "train.stop_at": ["train.stop_at=3"],
    "train.global_batch_size": ["train.global_batch_size=8"],
    "train.micro_batch_size": ["train.micro_batch_size=1"],
    "train.precision": ["train.precision=fp32"],
    "train.kernels": ["train.kernels=plain"],
    "train.seed": ["train.seed=3"],
    "train.init_from": ["train.init_from=elsewhere"],
    "fp8.recipe": ["fp8.recipe=block", "train.precision=fp8"],
    "fp8.amax_history": ["fp8.amax_history=3", "fp8.recipe=delayed", "train.precision=fp8"],
    "fp8.first_layers_bf16": ["fp8.first_layers_bf16=1", "train.precision=fp8"],
    "fp8.last_layers_bf16": ["fp8.last_layers_bf16=1", "train.precision=fp8"],
    "evaluate.every": ["evaluate.every=3"],
    "evaluate.initial": ["evaluate.initial=false"],
    "evaluate.samples": ["evaluate.samples=3"],
    "evaluate.noise_samples": ["evaluate.noise_samples=3"],
    "generate.steps": ["generate.steps=3"],
    "generate.sampler": ["generate.sampler=em"],
    "generate.temperature": ["generate.temperature=0.5"],
    "generate.guidance": ["diffusion.condition_drop=0.1", "generate.guidance=2"],
    "checkpoint.every": ["checkpoint.every=3"],
    "checkpoint.keep": ["checkpoint.keep=1"],
    "checkpoint.keep_every": ["checkpoint.keep_every=3"],
    "checkpoint.background": ["checkpoint.background=false"],
    "checkpoint.initial": ["checkpoint.initial=true"],
    "checkpoint.mirror": ["checkpoint.mirror=file:///x"],
    "log.every": ["log.every=3"],
    "log.to": ["log.to=[]"],
}


def made(*overrides: str, folder: str = "x") -> dict[str, Any]:
    manifest = Manifest(Path(folder), {"train": Split(())}, "t", "0", 300, 2, "uint16", {}, "0")
    return identity(load_config(overrides=[*DIFFUSION, *overrides]), Corpus.of(manifest), "code")


def test_every_key_is_of_one_kind() -> None:
    """A new key has to be classed, and to be tried below."""
    names = {name for name, _ in leaves()}
    assert set(KINDS) == names
    assert set(ANOTHER) == names


@pytest.mark.parametrize("key", ANOTHER)
def test_a_key_has_the_effect_of_its_kind(key: str) -> None:
    head = CHAIN if key in ("model.head.window", "model.head.prior_rank") else DIFFUSION
    if key.startswith("model.memory.") and key != "model.memory.rows":  # of no effect without rows
        assert meaning(load_config(overrides=[*head, *ANOTHER[key]])) == meaning(load_config(overrides=head))
        head = [*head, "model.memory.rows=64"]
    plain, changed = (load_config(overrides=[*head, *more]) for more in ([], ANOTHER[key]))
    model, run = meaning(plain) != meaning(changed), made(*head) != made(*head, *ANOTHER[key])
    assert (model, run) == {Kind.MODEL: (True, True), Kind.RUN: (False, True)}.get(KINDS[key], (False, False))
    if model:  # what the message says to set makes them one model
        with pytest.raises(UserError, match=r"x is of another model: .* there and .* here; set ") as said:
            compare_model(meaning(changed), made(*head), "x")
        pairs = str(said.value).partition("; set ")[2].split()
        assert meaning(load_config(overrides=[*head, *pairs])) == meaning(changed)


def test_the_same_in_other_words() -> None:
    def of(*overrides: str) -> dict[str, Any]:
        return meaning(load_config(overrides=list(overrides)))

    assert of(*DIFFUSION, "model.head_dim=64") == of(*DIFFUSION)  # 256 / 4
    thirteen = ["model.head.kind=chain", "model.bits=13"]
    assert of(*thirteen, "model.group_bits=8") == of(*thirteen, "model.group_bits=7")  # (7, 6) both
    peer = ["model.head.kind=softmax", "model.block_size=1"]
    assert of(*peer, "model.bits=9", "model.head.num_layers=7", "model.attention=block_causal") == of(*peer)
    assert of(*CHAIN, "diffusion.parameterization=direct") == of(*CHAIN)  # a chain never sees a noisy bit
    sees = ["model.head.token_before=null", "model.head.soft_prior=null"]
    assert of(*DIFFUSION, *sees) == of(*DIFFUSION, *(pair.replace("null", "true") for pair in sees)) != of(*DIFFUSION)
    assert of(*CHAIN, *sees) == of(*CHAIN)
    follows = ["model.names=auto", "model.head.prior_rank=null"]
    assert of(*CHAIN, *follows) == of(*CHAIN, "model.names=pairs", "model.head.prior_rank=256") != of(*CHAIN)
    assert of(*DIFFUSION, *follows) == of(*DIFFUSION, "model.names=pairs") != of(*DIFFUSION)
    for single in (["model.group_bits=1"], ["model.bits=4"]):
        assert of(*CHAIN, *single, *follows) == of(*CHAIN, *single)


def test_self_conditioning_is_part_of_a_run() -> None:
    """Its weights are; how often training shows it may change."""
    without, shown = made(), made("diffusion.self_condition=0.5")
    compare_run(made("diffusion.self_condition=0.3"), shown, "run")
    for there, mine in ((without, shown), (shown, without)):
        with pytest.raises(UserError, match=r"run is of another run: diffusion.self_condition above 0 is "):
            compare_run(there, mine, "run")


def test_how_many_levels_are_apart_is_free() -> None:
    apart, without = made("diffusion.levels_apart=1"), made()
    compare_run(made("diffusion.levels_apart=3"), apart, "run")
    for there, mine in ((without, apart), (apart, without)):
        with pytest.raises(UserError, match=r"run is of another run: diffusion.levels_apart above 0 is "):
            compare_run(there, mine, "run")


def test_how_many_blocks_are_noisy_is_free() -> None:
    noisy, without = made(*CHAIN, "diffusion.noisy_every=2"), made(*CHAIN)
    compare_run(made(*CHAIN, "diffusion.noisy_every=1"), noisy, "run")
    for there, mine in ((without, noisy), (noisy, without)):
        with pytest.raises(UserError, match=r"run is of another run: diffusion.noisy_every above 0 is "):
            compare_run(there, mine, "run")


def test_a_folder_of_before_a_key_has_its_default() -> None:
    old = made()
    for key in (SHOWN, TOLD, "data.align_blocks", "diffusion.parameterization"):
        old.pop(key)
    compare_run(of_folder(old, made(), "run"), made(), "run")
    for key in ("diffusion.self_condition=1", "data.align_blocks=true", "diffusion.parameterization=direct"):
        with pytest.raises(UserError, match=r"is (False|matched_filter) there and (True|direct) here"):
            compare_run(of_folder(old, made(key), "run"), made(key), "run")


def test_a_folder_of_037cb16() -> None:
    """It held the whole section `model`, also what has no effect, and did not say how a head is parameterized."""
    config = load_config(overrides=DIFFUSION)
    old = {key: value for key, value in made().items() if not key.startswith(("model.", "diffusion."))}
    old |= {"model": config.model.model_dump(mode="json", exclude={"vocab_size"}), SHOWN: False}
    compare_run(of_folder(old, made(), "run"), made(), "run")
    for more in (["model.head.window=3"], ["diffusion.parameterization=direct"]):  # no effect; asked of the checkpoint
        compare_run(of_folder(old, made(*more), "run"), made(*more), "run")
    for more in (["model.rope_base=50"], ["model.init_std=0.1"], ["diffusion.self_condition=0.5"], ["train.seed=3"]):
        with pytest.raises(UserError, match=f"{more[0].partition('=')[0]}.* there and "):
            compare_run(of_folder(old, made(*more), "run"), made(*more), "run")


def test_a_checkpoint_says_it_by_its_configuration() -> None:
    config = load_config(overrides=[*DIFFUSION, "diffusion.parameterization=direct"])
    meta = {"identity": {"tokenizer": "0"}, "config": config.model_dump(mode="json")}
    there = of_checkpoint(meta, "c")
    assert there["diffusion.parameterization"] == "direct" and there["tokenizer"] == "0" and there["data"] is None
    del meta["config"]["diffusion"]["parameterization"]  # of before the key
    assert of_checkpoint(meta, "c")["diffusion.parameterization"] == "matched_filter"
    for broken in ({}, {"identity": [], "config": {}}, {"identity": {}, "config": {"model": {"bits": -1}}}):
        with pytest.raises(UserError, match=r"^c has a "):
            of_checkpoint(broken, "c")


def test_weights_can_be_taken_into_another_run_of_the_same_model() -> None:
    there = model_of(made("train.seed=3", "data.seq_length=128", "model.init_std=0.1"))
    compare_model(there, made(), "w")
    with pytest.raises(UserError, match="w is of another model: tokenizer is 0 there and 1 here; give the data "):
        compare_model(there, {**made(), "tokenizer": "1"}, "w")
    with pytest.raises(
        UserError, match=r"rope_base is 50.0 there and 10000.0 here; set model.rope_base=50.0 model.bits"
    ):
        compare_model(model_of(made("model.rope_base=50", "model.bits=11")), made(), "w")
