"""A Hugging Face folder's config.json in our terms: which model it is, and what of it no layer here can be.

Whatever a key may change is either ours too, or has to have its neutral value, or is known to change nothing; a key
that is none of these is refused, because a layer would compute something else than it was trained for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bit.config import config_from_dict
from megatron_bit.errors import UserError
from megatron_bit.io.strict_json import MIB, OBJECT, load
from megatron_bit.run.identity import meaning

BITLM = "bitlm"
LLAMA_LAYOUT = ("llama", "qwen3")

# read below
_SIZES = """
    model_type num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size
    rms_norm_eps vocab_size tie_word_embeddings qk_norm rope_theta rope_parameters rope_scaling layer_types
    sliding_window use_sliding_window
"""
_OURS = """
    bits block_size block_causal max_position_embeddings head_hidden_size head_intermediate_size head_num_layers
    head_num_attention_heads head_kind head_prior head_window group_sizes names prior_rank token_before soft_prior
    memory_rows memory_orders memory_hashes matched_filter sigma_min sigma_max sigma_log_mean sigma_log_std sigma_kind
    sigma_masses levels_apart noisy_blocks condition_drop self_condition initializer_range
"""
_NEUTRAL: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
}
# of texts, of training, of how it is run and shown; none changes what a layer computes
_NO_EFFECT = """
    _attn_implementation _name_or_path architectures attention_dropout auto_map bos_token_id code_fingerprint
    decoder_start_token_id dtype eos_token_id forced_bos_token_id forced_eos_token_id hidden_dropout id2label
    initializer_range label2id max_position_embeddings max_window_layers name_or_path output_attentions
    output_hidden_states pad_token_id problem_type return_dict sep_token_id suppress_tokens task_specific_params
    tokenizer_class tokenizer_fingerprint tokenizer_sha256 torch_dtype training_step training_weights
    transformers_version unk_token_id use_cache use_return_dict
"""
_OFF = (None, False, 0, [], {}, "")  # values of what is there and not used


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError if there is none."""
    return load(path, OBJECT, str(path), 256 * MIB, "copy it back, or convert again")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model whose weights can be taken.

    Raises:
        UserError: there is none, it is of another type, or its layers compute what none here can.
    """
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} has no config.json, so it is no Hugging Face folder; give one that `convert` made")
    there = read_json(path)
    kind = there.get("model_type", "")
    if kind not in (*LLAMA_LAYOUT, BITLM):
        raise UserError(
            f"{folder} is a model of type {kind!r}; weights can be taken from {', '.join(LLAMA_LAYOUT)} "
            "and from converted BitLMs"
        )
    _check_neutral(folder, there)
    _check_rope(folder, there)
    _check_attention(folder, there)
    return there


def _check_neutral(folder: Path, there: Mapping[str, Any]) -> None:
    for key, allowed in _NEUTRAL.items():
        value = there.get(key, allowed)
        if value != allowed and not (value is None and key == "partial_rotary_factor"):
            raise UserError(f"{folder} has {key} {value}, and a layer here can only have {allowed}")
    if there.get("auto_map") and there["model_type"] != BITLM:
        raise UserError(f"{folder} is a model with code of its own (auto_map), which may change what a layer computes")
    ours = _OURS if there["model_type"] == BITLM else ""
    known = {*_NEUTRAL, *f"{_SIZES} {_NO_EFFECT} {ours}".split()}
    for key in sorted(there.keys() - known):
        if there[key] not in _OFF:
            raise UserError(
                f"{folder / 'config.json'} has {key} = {str(there[key])[:60]}, which is not known here and may change "
                "what a layer computes; remove the key if it does not"
            )


def _check_rope(folder: Path, there: Mapping[str, Any]) -> None:
    for name in ("rope_parameters", "rope_scaling"):
        rope = there.get(name) or {}
        if not isinstance(rope, Mapping):
            raise UserError(f"{folder} has {name} {rope}, which is no object")
        for key, value in rope.items():
            allowed = {"rope_type": "default", "type": "default", "factor": 1.0, "partial_rotary_factor": 1.0}
            if key != "rope_theta" and value != allowed.get(key):
                what = "rope type" if key in ("rope_type", "type") else f"{name}.{key}"
                only = allowed.get(key, "none")
                raise UserError(f"{folder} has {what} {value}, and a layer here can only have {only}")
    places = (there, there.get("rope_parameters") or {}, there.get("rope_scaling") or {})
    bases = {place["rope_theta"] for place in places if place.get("rope_theta") is not None}
    if len(bases) > 1:
        raise UserError(f"{folder} has two values of rope_theta: {' and '.join(map(str, bases))}; remove the wrong one")


def _check_attention(folder: Path, there: Mapping[str, Any]) -> None:
    window = there.get("sliding_window")
    if there.get("use_sliding_window", window not in _OFF):
        raise UserError(f"{folder} has sliding_window {window}, and a layer here sees the whole sequence")
    types = there.get("layer_types") or ()
    other = [kind for kind in types if kind != "full_attention"]
    if other:
        raise UserError(f"{folder} has layers of type {other[0]}, and a layer here can only be of full_attention")


def layer_settings(there: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ModelConfig that the layers of a config.json decide. Raises KeyError.

    What it leaves out has the default of its type in transformers (5.24: LlamaConfig, Qwen3Config).
    """
    heads, qwen = there["num_attention_heads"], there.get("model_type") == "qwen3"
    rope = there.get("rope_parameters") or there.get("rope_scaling") or {}
    return {
        "num_layers": there["num_hidden_layers"],
        "hidden_size": there["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": there.get("num_key_value_heads") or (32 if qwen else heads),
        "head_dim": there.get("head_dim") or (128 if qwen else there["hidden_size"] // heads),
        "ffn_hidden_size": there["intermediate_size"],
        "norm_eps": there.get("rms_norm_eps", 1e-6),
        "rope_base": rope.get("rope_theta", there.get("rope_theta", 10000.0)),
        "qk_norm": there.get("qk_norm", qwen),
    }


def settings(folder: Path, there: Mapping[str, Any], code: str) -> dict[str, Any]:
    """The configuration that a config.json decides, as a tree. UserError if it lacks a key, or a value is none.

    Args:
        code: `model.code` of a BitLM's table.
    """
    try:
        layers = layer_settings(there)
        tree = {"model": layers} if there["model_type"] in LLAMA_LAYOUT else _bitlm(there, layers, code)
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'} has no {error.args[0]}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{folder / 'config.json'} has a value that is none: {error}") from None
    try:
        config = config_from_dict(tree)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'} cannot be a model here: {error}") from None
    if there["model_type"] == BITLM and list(config.model.group_sizes) != there["group_sizes"]:
        raise UserError(
            f"{folder / 'config.json'} has group_sizes {there['group_sizes']}, and {there['bits']} bits are cut into "
            f"{list(config.model.group_sizes)} here"
        )
    return tree


def meaning_of(there: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """`identity.meaning` of a folder, from its `settings`; of the Llama layout what its layers say."""
    whole = meaning(config_from_dict(tree))
    if there["model_type"] == BITLM:
        return whole
    return {key: value for key, value in whole.items() if key.removeprefix("model.") in tree["model"]}


def _bitlm(there: Mapping[str, Any], layers: Mapping[str, Any], code: str) -> dict[str, Any]:
    """What inference/hf_names.py makes of a configuration, the other way round."""
    head = {
        "kind": there["head_kind"],
        "prior": there["head_prior"],
        "window": there["head_window"],
        "prior_rank": there.get("prior_rank", 0),  # younger than the first folders, as the two below
        "token_before": there.get("token_before", False),
        "soft_prior": there.get("soft_prior", False),
        "num_layers": there["head_num_layers"],
        "hidden_size": there["head_hidden_size"],
        "num_heads": there["head_num_attention_heads"],
        "ffn_hidden_size": there["head_intermediate_size"],
    }
    model = {
        **layers,
        "bits": there["bits"],
        "code": code,
        "group_bits": max(there["group_sizes"]),
        "names": there.get("names", "sum"),
        "block_size": there["block_size"],
        "attention": "block_causal" if there["block_causal"] else "causal",
        "init_std": there["initializer_range"],
        "head": head,
        "memory": {  # younger than the first folders
            "rows": there.get("memory_rows", 0),
            "orders": there.get("memory_orders", [2, 3]),
            "hashes": there.get("memory_hashes", 1),
        },
    }
    diffusion = {
        "parameterization": "matched_filter" if there["matched_filter"] else "direct",
        "sigma_min": there["sigma_min"],
        "sigma_max": there["sigma_max"],
        "log_mean": there["sigma_log_mean"],
        "log_std": there["sigma_log_std"],
        "noise": there["sigma_kind"],
        "levels_apart": 1 if there.get("levels_apart", False) else 0,  # at least; how many is up to the run
        "noisy_every": 8 if there.get("noisy_blocks", False) else 0,  # of how many is up to the run
        "condition_drop": there["condition_drop"],
        "self_condition": 0.5 if there["self_condition"] else 0.0,
    }
    return {"model": model, "diffusion": diffusion, "data": {"seq_length": there["max_position_embeddings"]}}
