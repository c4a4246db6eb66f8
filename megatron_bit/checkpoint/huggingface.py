"""Weights of a Hugging Face folder, read as logical tensors: a converted run, or an AR model of the Llama layout.

Llama and Qwen3 write a layer as we do: RMSNorm, grouped queries, RoPE that turns channel i with i + d/2,
SwiGLU. Only the fused projection of queries, keys and values has to be put together: its rows go group by group, the
group's query heads, its key head, its value head.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_bit.checkpoint import hf_config
from megatron_bit.checkpoint.hf_config import BITLM, read_json
from megatron_bit.checkpoint.index import Rectangle
from megatron_bit.config import config_from_dict
from megatron_bit.errors import UserError
from megatron_bit.model.codec import CODES, Codec, RawCodec, table_fingerprint
from megatron_bit.parallel.logical import VOCABULARY
from megatron_bit.run import identity

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

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UserError: the folder is no model whose layers can be ours.
        """
        self.folder = folder
        self._there = hf_config.read_config(folder)
        self.kind: str = self._there["model_type"]
        self.vocab_size: int = self._there.get("vocab_size") or 0  # 0: raw records
        self._files: dict[str, Any] = {}
        index = folder / "model.safetensors.index.json"
        self._where = _weight_map(index) if index.exists() else {}
        self.settings = hf_config.settings(folder, self._there, self._code() if self.kind == BITLM else "")
        self._model = config_from_dict(self.settings).model
        self._check_names()
        self.has_tokens = False  # whether the rows of tokens of a softmax model are taken as well: `check` says

    def check(self, mine: Mapping[str, Any], where: str) -> None:
        """UserError if the weights mean something else to a run of the identity `mine`, or cannot be shown not to."""
        softmax = mine["model.head.kind"] == "softmax"
        there = hf_config.meaning_of(self._there, self.settings)
        if self.kind == BITLM:
            if softmax:
                raise UserError(
                    f"{where} is a converted BitLM, and model.head.kind is softmax; weights can be taken from a "
                    f"converted softmax run and from {', '.join(hf_config.LLAMA_LAYOUT)}"
                )
            code = (
                RawCodec(self._model.bits).fingerprint if not self.vocab_size else table_fingerprint(self.code_table())
            )
            there |= {identity.VOCABULARY: self.vocab_size, identity.CODE: code}
        identity.compare_model(there, mine, where)
        self.has_tokens = softmax and self.vocab_size == mine[identity.VOCABULARY]
        if self.kind == BITLM or self.has_tokens:
            self._check_tokenizer(mine, where)

    def _check_tokenizer(self, mine: Mapping[str, Any], where: str) -> None:
        """By what `convert` wrote down of the data folder's tokenizer; else one of the folder's files has to be it."""
        said = self._there.get("tokenizer_sha256")
        if said is not None:
            identity.compare_model({identity.TOKENIZER: said}, mine, where)
            return
        files = (self.folder / name for name in ("tokenizer.json", "tokenizer.model"))
        digests = (hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file())
        if mine[identity.TOKENIZER] not in digests:
            raise UserError(
                f"{where} cannot be shown to be of the tokenizer of data.path ({mine[identity.TOKENIZER]}), and its "
                "weights would mean other tokens; prepare the data with its tokenizer (`megatron-bit prepare "
                "--tokenizer`), and convert again what an older version converted"
            )

    def _code(self) -> str:
        """The value of model.code that makes the folder's table; one that is none of CODES was learned."""
        if not self.vocab_size:
            return "raw"
        table = self.code_table()
        for code in CODES:
            if torch.equal(Codec(code, len(table), table.shape[1]).table, table):
                return code
        return "semantic"

    def _check_names(self) -> None:
        """UserError for a tensor that no layer here has, such as a bias that config.json does not tell of."""
        inside = {*_IN_LAYER.values(), *(f"self_attn.{letter}_proj.weight" for letter in "qkv")}
        for name in self._where or self._file("model.safetensors").keys():  # no mapping
            match = re.match(r"^model\.layers\.(\d+)\.(.+)$", name)
            if match is None or match[2].endswith("rotary_emb.inv_freq"):
                continue
            if match[2] not in inside or int(match[1]) >= self._model.num_layers:
                raise UserError(f"{self.folder} has a tensor {name}, and a layer here has none such")

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
        size, theirs = self.vocab_size, _name(name)
        if self._there.get("tie_word_embeddings"):
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
        if name not in self._file(file).keys():  # noqa: SIM118  # no mapping
            raise UserError(f"weights {self.folder / file} have no tensor {name}")
        return self._file(file)

    def _file(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(str(self.folder / file), framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"weights {self.folder / file} cannot be read: {error}") from None
        return self._files[file]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor to file; UserError for an index that names what is no plain file of the folder."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(
        isinstance(file, str) and re.fullmatch(r"[\w.-]+\.safetensors", file, re.ASCII) for file in where.values()
    ):
        raise UserError(f"{index} has no weight_map of tensors and safetensors files; convert again, or copy it again")
    return where


def _name(logical: str) -> str:
    """The folder's name of a tensor that is not fused."""
    if match := _LAYER.match(logical):
        return f"model.layers.{match.group(1)}.{_IN_LAYER[match.group(2)]}"
    if match := _HEAD_LAYER.match(logical):
        return f"head.layers.{match.group(1)}.{_IN_HEAD_LAYER[match.group(2)]}"
    return _OUTSIDE.get(logical, logical.replace("head.noise_level.", "head.noise_embed."))
