"""Weights of a Hugging Face folder, read as logical tensors: a converted run, or an AR model of the Llama layout.

Llama and Qwen3 write a layer as we do: RMSNorm, grouped queries, RoPE that turns channel i with i + d/2,
SwiGLU. Only the fused projection of queries, keys and values has to be put together: its rows go group by group, the
group's query heads, its key head, its value head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_bit.checkpoint.index import Rectangle
from megatron_bit.config import ModelConfig
from megatron_bit.errors import UserError
from megatron_bit.model.logical import VOCABULARY

LLAMA_LAYOUT = ("llama", "qwen3")
BITLM = "bitlm"

_LAYER = re.compile(r"^backbone\.layers\.(\d+)\.(.+)$")
_IN_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.gate.weight": "mlp.gate_proj.weight",
    "mlp.linear_fc1.up.weight": "mlp.up_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_HEAD_LAYER = re.compile(r"^head\.layers\.(\d+)\.(.+)$")
_IN_HEAD_LAYER = {
    "proj.weight": "self_attn.o_proj.weight",
    "fc1.gate.weight": "mlp.gate_proj.weight",
    "fc1.up.weight": "mlp.up_proj.weight",
    "fc2.weight": "mlp.down_proj.weight",
}
_OUTSIDE = {
    "backbone.final_layernorm.weight": "model.norm.weight",
    "embedding.table.weight": "model.embed_tokens.weight",
    "head.logits.weight": "lm_head.weight",
    "embedding.start": "model.embed_tokens.start",
    "embedding.fc1.weight": "model.embed_tokens.fc1.weight",
    "embedding.fc2.weight": "model.embed_tokens.fc2.weight",
    "embedding.norm.weight": "model.embed_tokens.norm.weight",
    "head.input.weight": "head.in_proj.weight",
    "head.estimate.weight": "head.estimate_proj.weight",
    "head.condition.weight": "head.condition_proj.weight",
    "head.condition_last.weight": "head.condition_last_proj.weight",
    "head.prior.weight": "head.prior_proj.weight",
    "head.prior_last.weight": "head.prior_last_proj.weight",
    "head.stage": "head.stages",
    "embedding.values": "model.embed_tokens.values",
    "head.output.weight": "head.out_proj.weight",
}


class HuggingFaceWeights:
    """Random access to the weights of a folder with config.json and safetensors files."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """
        Raises:
            UserError: the folder is no such model, or one that this configuration cannot hold; says what to set.
        """
        self.folder = folder
        self._model = model
        self.config = read_json(folder / "config.json")
        self.kind: str = self.config.get("model_type", "")
        if self.kind not in (*LLAMA_LAYOUT, BITLM):
            raise UserError(
                f"{folder} is a model of type {self.kind!r}; weights can be taken from {', '.join(LLAMA_LAYOUT)} "
                "and from converted BitLMs"
            )
        if self.kind in LLAMA_LAYOUT:
            self._check_layers()
        elif model.head.kind == "softmax":
            raise UserError(
                f"{folder} is a converted BitLM, and model.head.kind is softmax; weights can be taken from a converted "
                f"softmax run and from {', '.join(LLAMA_LAYOUT)}"
            )
        # the same number of tokens: a softmax model can take their rows as well
        self.has_tokens = model.head.kind == "softmax" and self.config.get("vocab_size") == model.vocab_size
        index = folder / "model.safetensors.index.json"
        self._where: dict[str, str] = read_json(index)["weight_map"] if index.exists() else {}
        self._files: dict[str, Any] = {}

    @property
    def partial(self) -> bool:
        """Whether it holds the backbone's layers alone."""
        return self.kind != BITLM and not self.has_tokens

    def has(self, name: str) -> bool:
        """Whether a logical tensor is to be found here."""
        return not self.partial or name.startswith("backbone.")

    def read(self, name: str, full_shape: tuple[int, ...], box: Rectangle) -> Tensor:
        """float32 tensor of box.shape; UserError if the folder's tensor has another shape or is missing."""
        m = self._model
        if (match := _LAYER.match(name)) and match.group(2) == "self_attention.linear_qkv.weight":
            prefix, queries = f"model.layers.{match.group(1)}.self_attn.", m.num_heads // m.num_kv_heads
            return self._fused(prefix, (m.num_kv_heads, m.attention_head_dim), queries, box)
        if (match := _HEAD_LAYER.match(name)) and match.group(2) == "qkv.weight":
            heads = m.head.num_heads
            return self._fused(f"head.layers.{match.group(1)}.self_attn.", (heads, m.head.hidden_size // heads), 1, box)
        if name in VOCABULARY:
            return self._tokens(name, full_shape[1], box)
        return self._slice(_name(name), full_shape, box)

    def forget(self) -> None:
        """Unmap the files: what was read of them stays in memory until then."""
        self._files.clear()

    def code_table(self) -> Tensor:
        """int8 [V, B] of a converted BitLM."""
        return self._open("model.code_table").get_tensor("model.code_table")

    def _tokens(self, name: str, columns: int, box: Rectangle) -> Tensor:
        """Rows of tokens; those behind the vocabulary are zero."""
        size, theirs = self._model.vocab_size, _name(name)
        assert size is not None
        if self.config.get("tie_word_embeddings"):
            theirs = _OUTSIDE["embedding.table.weight"]
        out, count = torch.zeros(box.shape), min(box.shape[0], size - box.offset[0])
        if count > 0:
            out[:count] = self._slice(theirs, (size, columns), Rectangle(box.offset, (count, box.shape[1])))
        return out

    def _fused(self, prefix: str, groups: tuple[int, int], queries: int, box: Rectangle) -> Tensor:
        """Rows of the fused projection, run by run. groups: (number of groups, rows of a head)."""
        count, head = groups
        columns = self._model.hidden_size if prefix.startswith("model.") else self._model.head.hidden_size
        out = torch.empty(box.shape)
        row, end = box.offset[0], box.offset[0] + box.shape[0]
        while row < end:
            group, place = divmod(row // head, queries + 2)
            take = min(head - row % head, end - row)
            letter, of = ("q", group * queries + place) if place < queries else ("kv"[place - queries], group)
            source = Rectangle((of * head + row % head, box.offset[1]), (take, box.shape[1]))
            full = (count * (queries if letter == "q" else 1) * head, columns)
            at = row - box.offset[0]
            out[at : at + take] = self._slice(f"{prefix}{letter}_proj.weight", full, source)
            row += take
        return out

    def _slice(self, name: str, full_shape: tuple[int, ...], box: Rectangle) -> Tensor:
        view = self._open(name).get_slice(name)
        shape = tuple(view.get_shape())
        if shape != full_shape:
            raise UserError(f"{self.folder}: tensor {name} has shape {shape}, the configuration wants {full_shape}")
        return view[box.slices((0,) * len(box.offset))].float()

    def _open(self, name: str) -> Any:
        file = self._where.get(name, "model.safetensors")
        if file not in self._files:
            try:
                self._files[file] = safe_open(str(self.folder / file), framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"weights {self.folder / file} cannot be read: {error}") from None
        if name not in self._files[file].keys():  # noqa: SIM118  # no mapping
            raise UserError(f"weights {self.folder / file} have no tensor {name}")
        return self._files[file]

    def _check_layers(self) -> None:
        """Every difference in one line, as the key=value pairs that mend it."""
        there, m = self.config, self._model
        rope = _rope(there)
        kind = rope.get("rope_type", rope.get("type", "default"))
        for key, value, allowed in (
            ("attention_bias", there.get("attention_bias", False), False),
            ("mlp_bias", there.get("mlp_bias", False), False),
            ("hidden_act", there.get("hidden_act", "silu"), "silu"),
            ("rope type", kind, "default"),
        ):
            if value != allowed:
                raise UserError(f"{self.folder} has {key} {value}, and a layer here can only have {allowed}")
        wanted = {f"model.{key}": value for key, value in layer_settings(there).items()}
        here = {**m.model_dump(), "head_dim": m.attention_head_dim}
        wrong = {k: v for k, v in wanted.items() if here[k.removeprefix("model.")] != v}
        if wrong:
            key = next(iter(wrong))
            mine = here[key.removeprefix("model.")]
            pairs = " ".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in wrong.items())
            raise UserError(f"{key} is {mine}, and the layers of {self.folder} have {wrong[key]}; set {pairs}")


def layer_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ModelConfig that the layers of a config.json of the Llama layout decide."""
    heads = config["num_attention_heads"]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim_of(config),
        "ffn_hidden_size": config["intermediate_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_base": _rope(config).get("rope_theta", config.get("rope_theta", 10000.0)),
        "qk_norm": config.get("qk_norm", config.get("model_type") == "qwen3"),
    }


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Width of an attention head that a config.json says, or leaves to its other sizes."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _name(logical: str) -> str:
    """The folder's name of a tensor that is not fused."""
    if match := _LAYER.match(logical):
        return f"model.layers.{match.group(1)}.{_IN_LAYER[match.group(2)]}"
    if match := _HEAD_LAYER.match(logical):
        return f"head.layers.{match.group(1)}.{_IN_HEAD_LAYER[match.group(2)]}"
    return _OUTSIDE.get(logical, logical.replace("head.noise_level.", "head.noise_embed."))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError if there is none."""
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no JSON object")
    return tree
