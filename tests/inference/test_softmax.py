"""A softmax run as an ordinary Qwen3 or Llama of transformers, and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import torch.nn.functional as F
from generation import run_card
from gloo_ranks import run_ranks
from safetensors.torch import load_file

from megatron_bit.checkpoint.load import load_weights
from megatron_bit.config import load_config
from megatron_bit.data.manifest import load_manifest
from megatron_bit.errors import UserError
from megatron_bit.inference.convert import to_hf
from megatron_bit.inference.generate import Generator
from megatron_bit.model.build import build_model
from megatron_bit.model.chunk import TokenBatch
from megatron_bit.run.folder import newest_checkpoint

VOCAB_SIZE = 421
SOFTMAX: dict[str, Any] = {
    "model.head.kind": "softmax", "model.block_size": 1, "model.num_kv_heads": 2, "model.num_layers": 2,
    "model.rope_base": 500.0, "model.norm_eps": 2e-5, "train.steps": 1,
}  # fmt: skip


@dataclass
class Peer:
    run: Path
    folder: Path
    model: Any  # of transformers
    tokenizer: Any


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def peer(request: pytest.FixtureRequest, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Peer:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = tmp_path_factory.mktemp(request.param)
    settings = {**SOFTMAX, "model.qk_norm": request.param == "qwen3", "parallel.tp": 2, "checkpoint.keep": 9}
    assert run_ranks(tiny_runs.train, 2, tiny_runs.overrides(root / "run", tiny_data, settings)) == [0, 0]
    to_hf(root / "run", root / "hf")
    model = AutoModelForCausalLM.from_pretrained(root / "hf").eval()
    assert model.config.model_type == request.param
    return Peer(root / "run", root / "hf", model, AutoTokenizer.from_pretrained(root / "hf"))


def test_the_folder_is_an_ordinary_one(peer: Peer) -> None:
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in peer.folder.iterdir()} - {"curves.svg"} == {*names, "README.md"}
    assert run_card(peer.folder)
    config = json.loads((peer.folder / "config.json").read_text())
    identity = json.loads((peer.run / "identity.json").read_text())
    assert config["tokenizer_sha256"] == identity["tokenizer"] and config["code_fingerprint"] == "none"
    assert peer.model.config.tokenizer_sha256 == identity["tokenizer"]  # transformers keeps what it does not know
    assert "auto_map" not in config and config["architectures"] == [type(peer.model).__name__]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0  # for transformers 4, and for 5
    weights = load_file(peer.folder / "model.safetensors")
    assert weights.keys() == peer.model.state_dict().keys()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert weights[name].shape == (VOCAB_SIZE, 48)
    masters = tiny_runs.read_state(newest_checkpoint(peer.run), "param")
    assert not masters["head.logits.weight"][VOCAB_SIZE:].any()
    assert sum(t.double().square().sum() for t in masters.values()).item() == pytest.approx(
        sum(t.double().square().sum() for t in weights.values()).item(), rel=1e-12
    )


def test_logits_equal_those_that_were_trained(peer: Peer, groups: Any, tiny_data: Path) -> None:
    config = load_config(peer.run / "config.yaml", ["parallel.tp=1", "train.seed=3"])
    eos = load_manifest(tiny_data).eos_id
    (model,) = build_model(config, VOCAB_SIZE, groups, eos)
    load_weights(newest_checkpoint(peer.run), [model], groups)
    tokens = torch.randint(0, VOCAB_SIZE, (2, 36), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = model.hidden(tokens)
        ours = model.head.logits(hidden)[0].transpose(0, 1)[..., :VOCAB_SIZE]  # type: ignore[union-attr,operator]
        ids = torch.cat((torch.full((2, 1), peer.tokenizer.bos_token_id), tokens[:, :-1]), dim=1)
        theirs = peer.model(ids).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        nats = F.cross_entropy(theirs.transpose(1, 2), tokens)
        assert model(TokenBatch(tokens, torch.arange(2))).loss.item() == pytest.approx(nats.item(), rel=1e-6)


def test_the_tokenizer_begins_a_text_as_training_does(peer: Peer, tiny_data: Path) -> None:
    from megatron_bit.data.tokenizer import Tokenizer

    own = Tokenizer(load_manifest(tiny_data).tokenizer_path)
    for text in ("", "def f(x):\n", " </s>"):
        ids = peer.tokenizer(text)["input_ids"]
        assert ids == [own.eos_id, *own.encode(text)]
        assert peer.tokenizer.decode(ids, skip_special_tokens=True) == own.decode(own.encode(text))
    assert peer.tokenizer("a", add_special_tokens=False)["input_ids"] == own.encode("a")
    config = peer.model.generation_config
    assert (config.bos_token_id, config.eos_token_id) == (own.eos_id, own.eos_id)
    torch.manual_seed(0)
    assert peer.model.generate(**peer.tokenizer("", return_tensors="pt"), max_new_tokens=5).shape[1] <= 6


def test_generate_says_what_to_do(peer: Peer) -> None:
    with pytest.raises(UserError, match=r"has a softmax head.*`megatron-bit convert .*run --to hf DIR`"):
        Generator(peer.run)
    with pytest.raises(UserError, match=f"model of type {peer.model.config.model_type}, .* with transformers"):
        Generator(peer.folder)


def test_a_peer_with_memory_is_not_a_model_of_transformers(tiny_data: Path, tmp_path: Path) -> None:
    settings = {**SOFTMAX, "model.memory.rows": 64, "evaluate.every": 1, "evaluate.samples": 4}
    run_ranks(tiny_runs.train, 1, tiny_runs.overrides(tmp_path / "run", tiny_data, settings))
    assert (tmp_path / "run" / "validation.jsonl").read_text()  # which is where its figures are
    with pytest.raises(UserError, match=r"softmax peer with model.memory.* validation.jsonl"):
        to_hf(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def _start(run: Path, data: Path, peer: Peer, world: int = 1, **settings: Any) -> dict[str, torch.Tensor]:
    tree = {
        **SOFTMAX, "model.qk_norm": peer.model.config.model_type == "qwen3", "train.init_from": peer.folder,
        "checkpoint.initial": True, "train.seed": 8, **settings,
    }  # fmt: skip
    heard = run.parent / f"{run.name}.txt"
    codes = run_ranks(tiny_runs.aloud, world, tiny_runs.overrides(run, data, tree), heard)
    assert set(codes) == {0}
    return tiny_runs.read_state(run / "checkpoints" / "step-00000000", "param")


def test_a_new_run_begins_where_the_folder_is(peer: Peer, tiny_data: Path, tmp_path: Path) -> None:
    """To the bit, padding too; in another vocabulary, or under a denoising head, the layers alone."""
    trained = tiny_runs.read_state(newest_checkpoint(peer.run), "param")
    weights = _start(tmp_path / "run", tiny_data, peer, 2, **{"parallel.tp": 2})
    assert tiny_runs.worst(weights, trained)[0] == 0.0
    assert f"from all of {peer.folder}" in (tmp_path / "run.txt").read_text()
    remembers = _start(tmp_path / "memory", tiny_data, peer, **{"model.memory.rows": 8})
    assert len(remembers.pop("embedding.memory.table")) == 16  # keeps what it began with, which is zero but in tests
    assert tiny_runs.worst(remembers, trained)[0] == 0.0
    diffusion = {"model.head.kind": "diffusion", "model.block_size": 3}
    weights = _start(tmp_path / "bitlm", tiny_data, peer, **diffusion)
    same = {name: trained[name] for name in weights if name.startswith("backbone.")}
    assert tiny_runs.worst({name: weights[name] for name in same}, same)[0] == 0.0
    assert "embedding and head begin untrained" in (tmp_path / "bitlm.txt").read_text()


def test_other_vocabularies_and_bitlms(peer: Peer, converted: dict[str, Any], tiny_data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = peer.model.config.__class__.from_pretrained(peer.folder, vocab_size=11)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
    small = Peer(peer.run, tmp_path / "small", peer.model, peer.tokenizer)
    weights = _start(tmp_path / "layers", tiny_data, small)
    assert weights["head.logits.weight"].shape == (512, 48)
    assert "embedding and head begin untrained" in (tmp_path / "layers.txt").read_text()
    bitlm = Peer(peer.run, converted["k1"].folder, peer.model, peer.tokenizer)
    with pytest.raises(AssertionError, match=r"UserError: .* is a converted BitLM, and model.head.kind is softmax"):
        _start(tmp_path / "no", tiny_data, bitlm)
