"""Weights of a Hugging Face folder, read as logical tensors: a converted run, or an AR model of the Llama layout."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_bit.checkpoint import hf_config
from megatron_bit.checkpoint.hf_config import BITLM, read_json
from megatron_bit.checkpoint.hf_parts import Part, parts
from megatron_bit.checkpoint.index import Rectangle
from megatron_bit.config import Config, config_from_dict
from megatron_bit.errors import UserError
from megatron_bit.model.codec import CODES, Codec, RawCodec, table_fingerprint
from megatron_bit.run import identity

_LAYER = re.compile(r"^model\.layers\.\d+\.")


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
        config = self._config()
        self._model = config.model
        self._parts: dict[str, list[Part]] = {}  # by their logical tensors
        for part in parts(config):
            self._parts.setdefault(part.logical, []).append(part)
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

    def _config(self) -> Config:
        """The configuration of a model of ours that has these very tensors."""
        tree = self.settings
        if self.kind != BITLM:  # a vocabulary that is not told: its rows are never asked for
            vocabulary = {"vocab_size": self.vocab_size or 1, "block_size": 1, "head": {"kind": "softmax"}}
            tree = {**tree, "model": {**tree["model"], **vocabulary}}
        return config_from_dict(tree)

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
        known = {part.name for part in chain.from_iterable(self._parts.values())}
        for name in self._where or self._file("model.safetensors").keys():  # no mapping
            if _LAYER.match(name) and name not in known and not name.endswith("rotary_emb.inv_freq"):
                raise UserError(f"{self.folder} has a tensor {name}, and a layer here has none such")

    @property
    def partial(self) -> bool:
        """Whether it holds the backbone's layers alone."""
        return self.kind != BITLM and not self.has_tokens

    def has(self, name: str) -> bool:
        """Whether a logical tensor is to be found here. A memory that a softmax peer has beside is not: it begins at
        zero, where it changes nothing."""
        return name in self._parts and (not self.partial or name.startswith("backbone."))

    def read(self, name: str, full_shape: tuple[int, ...], box: Rectangle) -> Tensor:
        """float32 tensor of box.shape; UserError if the folder's tensor has another shape or is missing."""
        found = self._parts.get(name)
        if found is None:
            raise UserError(f"weights {self.folder} have nothing that is {name}")
        if found[0].logical_shape != full_shape:
            raise UserError(
                f"{self.folder}: {found[0].name} would be {name} {found[0].logical_shape}, the model wants {full_shape}"
            )
        out = torch.zeros(box.shape)  # padded rows of tokens stay zero
        at = 0
        while at < box.shape[0]:
            here = next(((part, *spot) for part in found if (spot := part.find(box.offset[0] + at))), None)
            if here is None:
                break
            part, row, count = here
            count = min(count, box.shape[0] - at)
            source = Rectangle((row, *box.offset[1:]), (count, *box.shape[1:]))
            out[at : at + count] = self._slice(part, source)
            at += count
        return out

    def forget(self) -> None:
        """Unmap the files: what was read of them stays in memory until then."""
        self._files.clear()

    def code_table(self) -> Tensor:
        """int8 [V, B] of a converted BitLM."""
        return self._open("model.code_table").get_tensor("model.code_table")

    def _slice(self, part: Part, box: Rectangle) -> Tensor:
        tied = part.name == "lm_head.weight" and self._there.get("tie_word_embeddings")
        name = "model.embed_tokens.weight" if tied else part.name
        view = self._open(name).get_slice(name)
        shape = tuple(view.get_shape())
        if shape != part.shape:
            raise UserError(f"{self.folder}: tensor {name} has shape {shape}, the configuration wants {part.shape}")
        return view[box.slices((0,) * len(box.offset))].float()

    def _open(self, name: str) -> Any:
        file = self._where.get(name, "model.safetensors")
        if name not in self._file(file).keys():  # noqa: SIM118  # no mapping
            raise UserError(f"weights {self.folder / file} have no tensor {name}")
        return self._file(file)

    def _file(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = _opened(self.folder / file)
        return self._files[file]


def check_shapes(folder: Path, there: Mapping[str, Any]) -> None:
    """Hold the tensors of a converted BitLM against its config.json, before memory is taken for either.

    Args:
        there: what config.json says.

    Raises:
        UserError: a size that no model here can have, a tensor that is missing or of another shape, no such files.
    """
    config = config_from_dict(hf_config.settings(folder, there, "binary" if there.get("vocab_size") else "raw"))
    index, shapes = folder / "model.safetensors.index.json", {}
    for file in sorted({*_weight_map(index).values()} if index.exists() else {"model.safetensors"}):
        held = _opened(folder / file)
        shapes |= {name: tuple(held.get_slice(name).get_shape()) for name in held.keys()}  # noqa: SIM118
    for part in parts(config):
        if shapes.get(part.name) != part.shape:
            has = f"of shape {shapes[part.name]}" if part.name in shapes else "missing"
            raise UserError(
                f"converted folder {folder}: tensor {part.name} is {has}, and config.json makes it {part.shape}; copy "
                "the folder again"
            )


def _opened(path: Path) -> Any:
    """A safetensors file; UserError if it is none or not there."""
    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"weights {path} cannot be read: {error}") from None


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor to file; UserError for an index that names what is no plain file of the folder."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(
        isinstance(file, str) and re.fullmatch(r"[\w.-]+\.safetensors", file, re.ASCII) for file in where.values()
    ):
        raise UserError(f"{index} has no weight_map of tensors and safetensors files; convert again, or copy it again")
    return where
