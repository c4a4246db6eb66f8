"""A config.json of another project: taken when every layer computes what ours does, else refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_bit.checkpoint.hf_config import layer_settings, read_config
from megatron_bit.checkpoint.huggingface import HuggingFaceWeights
from megatron_bit.errors import UserError

SIZES = {
    "vocab_size": 11, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def _folder(tmp_path: Path, kind: str = "llama", **changed: Any) -> Path:
    """What transformers writes for a model of this kind, with changes."""
    import transformers

    made = getattr(transformers, {"llama": "LlamaConfig", "qwen3": "Qwen3Config"}[kind])(**SIZES)
    made.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    tree = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))
    return tmp_path


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_transformers_writes_is_taken(kind: str, tmp_path: Path) -> None:
    settings = layer_settings(read_config(_folder(tmp_path, kind)))
    assert settings["num_layers"] == 2 and settings["rope_base"] == 10000.0 and settings["qk_norm"] == (kind == "qwen3")


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_is_left_out_has_transformers_default(kind: str, tmp_path: Path) -> None:
    import transformers

    left_out = dict.fromkeys(("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_parameters"), ...)
    settings = layer_settings(read_config(_folder(tmp_path, kind, **left_out)))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert settings["head_dim"] == theirs.head_dim and settings["num_kv_heads"] == theirs.num_key_value_heads
    assert settings["norm_eps"] == theirs.rms_norm_eps
    assert settings["rope_base"] == theirs.rope_parameters["rope_theta"]


HARMLESS = {
    "old names": {"rope_theta": 10000.0, "torch_dtype": "bfloat16", "_name_or_path": "x/y", "rope_scaling": None},
    "no window": {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
    "tensor parallel of before": {"pretraining_tp": 1},
    "unknown and off": {"final_logit_softcapping": None, "use_bidirectional_attention": False, "mtp_layers": 0},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_is_taken(name: str, tmp_path: Path) -> None:
    read_config(_folder(tmp_path, **HARMLESS[name]))


OTHER_LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    "biases": ({"attention_bias": True}, "attention_bias True, and a layer here can only have False"),
    "biases of the MLP": ({"mlp_bias": True}, "mlp_bias True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act gelu, and a layer here can only have silu"),
    "rope of Llama 3": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope type llama3"),
    "rope of before": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type linear"),
    "rope under its new name": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type yarn"),
    "a factor alone": ({"rope_parameters": {"rope_theta": 1e4, "factor": 4.0}}, "rope_parameters.factor 4.0"),
    "sections": ({"rope_scaling": {"mrope_section": [16, 24, 24]}}, "rope_scaling.mrope_section"),
    "two bases": ({"rope_theta": 5e5}, "two values of rope_theta"),
    "half of the channels": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "half, inside": ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "a window": ({"sliding_window": 4096}, "sliding_window 4096, and a layer here sees the whole sequence"),
    "a window, switched on": ({"sliding_window": 64, "use_sliding_window": True}, "sliding_window 64"),
    "a layer with one": ({"layer_types": ["full_attention", "sliding_attention"]}, "type sliding_attention"),
    "logit caps": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0, which is not known here"),
    "multipliers": ({"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0"),
    "another scale": ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar = 256"),
    "NoPE": ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
    "experts": ({"num_local_experts": 8}, "num_local_experts = 8"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "code of its own": ({"auto_map": {"AutoModel": "x.Y"}}, "code of its own"),
    "another type": ({"model_type": "mistral"}, "model of type 'mistral'"),
}


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_what_computes_something_else_is_refused(name: str, tmp_path: Path) -> None:
    changed, message = OTHER_LAYERS[name]
    with pytest.raises(UserError, match=message) as said:
        read_config(_folder(tmp_path, **changed))
    assert "\n" not in str(said.value) and str(tmp_path) in str(said.value)


def test_values_that_are_none(tmp_path: Path) -> None:
    for changed, message in (
        ({"num_hidden_layers": ...}, "config.json has no num_hidden_layers"),
        ({"num_attention_heads": 0, "head_dim": ...}, "has a value that is none"),
        ({"hidden_size": [48]}, "cannot be a model here: model.hidden_size"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "nan is no finite number"),
        ({"num_hidden_layers": -1}, "cannot be a model here: model.num_layers = -1"),
    ):
        with pytest.raises(UserError, match=message):
            HuggingFaceWeights(_folder(tmp_path, **changed))


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("model.layers.0.self_attn.q_proj.bias", False),  # Qwen2 has them without a word in its config.json
        ("model.layers.2.mlp.up_proj.weight", False),  # a third layer
        ("model.layers.0.post_feedforward_layernorm.weight", False),
        ("model.layers.1.self_attn.rotary_emb.inv_freq", True),  # a buffer that transformers once saved
        ("model.layers.1.mlp.up_proj.weight", True),
    ],
)
def test_tensors_that_no_layer_here_has(name: str, fits: bool, tmp_path: Path) -> None:
    save_file({name: torch.zeros(2)}, _folder(tmp_path) / "model.safetensors")
    if fits:
        HuggingFaceWeights(tmp_path)
        return
    with pytest.raises(UserError, match=f"has a tensor {name}, and a layer here has none such"):
        HuggingFaceWeights(tmp_path)
