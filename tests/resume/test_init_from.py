"""A new run starts with given weights: a checkpoint's, a converted folder's, or the layers of a Llama or Qwen3."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from gloo_ranks import run_ranks

from megatron_bit.checkpoint.folder import complete

HEAD_DIM = {"llama": 12, "qwen3": 20}  # hidden size / heads, and what is not
GQA = {"model.num_kv_heads": 2, "model.norm_eps": 1e-6, "train.steps": 2}


def _start(run: Path, data: Path, world: int = 1, **settings: Any) -> dict[str, torch.Tensor]:
    """Start a run; returns its weights at step 0."""
    arguments = tiny_runs.overrides(run, data, {**GQA, "checkpoint.initial": True, **settings})
    assert set(run_ranks(tiny_runs.train, world, arguments)) == {0}
    return tiny_runs.read_state(complete(run / "checkpoints")[0], "param")


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("init") / "run"
    _start(run, tiny_data)
    return run


def _llama(folder: Path, kind: str) -> Any:
    """A random model of transformers with the sizes of tiny_runs, saved to `folder`."""
    import transformers

    names = {"llama": ("LlamaConfig", "LlamaModel"), "qwen3": ("Qwen3Config", "Qwen3Model")}[kind]
    config_class, model_class = (getattr(transformers, name) for name in names)
    config = config_class(
        vocab_size=11, hidden_size=48, intermediate_size=88, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-6, head_dim=HEAD_DIM[kind], rope_theta=10000.0,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(1)
    model = model_class(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    causal = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]
    whole = getattr(transformers, causal)(config)
    whole.model = model
    whole.save_pretrained(folder)
    return model


def test_a_checkpoint_of_another_layout(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    source = complete(trained / "checkpoints")[-1]
    weights = _start(tmp_path / "run", tiny_data, 4, **{"train.init_from": source, "parallel.tp": 2, "parallel.pp": 2})
    assert tiny_runs.worst(weights, tiny_runs.read_state(source, "param"))[0] == 0.0
    assert tiny_runs.worst(weights, _start(tmp_path / "other", tiny_data, **{"train.seed": 5}))[0] > 0.01


def test_the_run_goes_on_from_its_own_checkpoint(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    settings = {"train.init_from": trained, "checkpoint.keep": 9}
    _start(tmp_path / "run", tiny_data, **settings, **{"train.stop_at": 1})
    _start(tmp_path / "run", tiny_data, **settings)
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2]


def test_a_converted_folder_and_back_to_the_bit(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    from megatron_bit.inference.convert import to_hf

    to_hf(trained, tmp_path / "hf", data=str(tiny_data))
    weights = _start(tmp_path / "run", tiny_data, 2, **{"train.init_from": tmp_path / "hf", "parallel.tp": 2})
    newest = complete(trained / "checkpoints")[-1]
    assert tiny_runs.worst(weights, tiny_runs.read_state(newest, "param"))[0] == 0.0


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_layers_of_an_ar_model(kind: str, tiny_data: Path, tmp_path: Path) -> None:
    """The backbone, given the same input, gives what transformers' model gives."""
    from megatron_bit.config import load_config
    from megatron_bit.model.build import build_model
    from megatron_bit.parallel import groups as process_groups

    model = _llama(tmp_path / "hf", kind)
    settings = {"train.init_from": tmp_path / "hf", "model.qk_norm": kind == "qwen3"}
    settings |= {"model.head_dim": HEAD_DIM[kind]}
    weights = _start(tmp_path / "run", tiny_data, 2, **settings, **{"parallel.tp": 2})
    config = load_config(None, tiny_runs.overrides(tmp_path / "x", tiny_data, {**GQA, **settings}))
    chunk = build_model(config, 421, process_groups.init(config))[0]
    from megatron_bit.checkpoint.load import load_weights

    load_weights(complete(tmp_path / "run" / "checkpoints")[0], [chunk], process_groups.init(config))
    x = torch.randn(2, 36, 48, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = chunk.backbone(x.transpose(0, 1).contiguous()).transpose(0, 1)
        theirs = model(inputs_embeds=x, use_cache=False).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    untouched = _start(tmp_path / "plain", tiny_data, **{"model.qk_norm": kind == "qwen3"})
    assert torch.equal(weights["head.input.weight"], untouched["head.input.weight"])


BAD = {
    "head_dim": ({"model.head_dim": 16}, "model.head_dim is 16, and the layers of .* have 12; set model.head_dim=12"),
    "sizes": ({"model.num_layers": 4}, "model.num_layers is 4, and the layers of .* have 5; set model.num_layers=5"),
    "qk_norm": ({"model.qk_norm": True}, "set model.qk_norm=false"),
    "nothing": ({"train.init_from": "/nowhere"}, "/nowhere has no complete checkpoint"),
}


@pytest.mark.parametrize("name", BAD)
def test_weights_that_do_not_fit(name: str, tiny_data: Path, tmp_path: Path) -> None:
    _llama(tmp_path / "hf", "llama")
    settings, message = BAD[name]
    arguments = {"train.init_from": tmp_path / "hf", "model.qk_norm": False, **settings}
    with pytest.raises(AssertionError, match=f"UserError: .*{message}"):
        _start(tmp_path / "run", tiny_data, 2, **arguments)


def test_weights_of_other_tokens(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    from megatron_bit.inference.convert import to_hf

    with pytest.raises(AssertionError, match=r"UserError: train.init_from .*model.code is binary there and gray here"):
        _start(tmp_path / "a", tiny_data, **{"train.init_from": trained, "model.code": "gray"})
    to_hf(trained, tmp_path / "hf", data=str(tiny_data))
    with pytest.raises(AssertionError, match=r"UserError: .* has another table of codes"):
        _start(tmp_path / "b", tiny_data, **{"train.init_from": tmp_path / "hf", "model.code": "gray"})


def test_damaged_weights(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(complete(trained / "checkpoints")[-1], tmp_path / "step-00000002"))
    path = source / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(AssertionError, match=r"UserError: train.init_from .*rank-00000.safetensors has changed"):
        _start(tmp_path / "run", tiny_data, 2, **{"train.init_from": source, "parallel.tp": 2})
