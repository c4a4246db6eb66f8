"""`train.init_from`: the weights that a new run starts with, from a run, a checkpoint or a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_bit.checkpoint.folder import problems, read_meta
from megatron_bit.checkpoint.huggingface import BITLM, HuggingFaceWeights, head_dim_of
from megatron_bit.checkpoint.index import Rectangle, owned_rectangles
from megatron_bit.checkpoint.load import open_reader
from megatron_bit.config import Config
from megatron_bit.errors import UserError
from megatron_bit.model.bitlm import BitInput
from megatron_bit.model.codec import RawCodec
from megatron_bit.model.logical import pieces
from megatron_bit.optim.optimizer import EMA, Optimizer
from megatron_bit.parallel.groups import Groups
from megatron_bit.run_folder import compare, newest_checkpoint


class Weights(Protocol):
    """Where weights come from."""

    @property
    def partial(self) -> bool:
        """The backbone's layers alone; the rest keeps its own initial values."""
        ...

    def has(self, name: str) -> bool: ...

    def read(self, name: str, full_shape: tuple[int, ...], box: Rectangle) -> Tensor: ...


class CheckpointWeights:
    """The fp32 masters of a checkpoint of ours."""

    partial = False

    def __init__(self, folder: Path) -> None:
        self._reader = open_reader(folder)
        self._folder = folder

    def has(self, name: str) -> bool:
        return True

    def read(self, name: str, full_shape: tuple[int, ...], box: Rectangle) -> Tensor:
        shape = self._reader.shape(name)
        if shape != full_shape:
            raise UserError(f"checkpoint tensor {name} has shape {shape}, the model wants {full_shape}")
        return self._reader.read(name, "param", box)


def init_from(source: str, config: Config, mine: dict[str, Any], optimizer: Optimizer, groups: Groups) -> str:
    """Fill this rank's masters; `optimizer.loaded(0)` then refreshes the model, on all ranks.

    Args:
        mine: the identity of the run that begins.

    Returns:
        what was taken, for a person.

    Raises:
        UserError: no such weights, damaged ones, or weights of a model with other sizes, tokens or codes.
    """
    weights = _open(Path(source), config, mine, optimizer, groups)
    layout = [pieces(chunk, groups) for chunk in optimizer.chunks]
    for fragment in optimizer.fragments():
        target = fragment.states["param"]
        for part in layout[fragment.chunk][fragment.name]:
            if not weights.has(part.name):
                continue
            for at, place in owned_rectangles(part, fragment.start, target.numel()):
                target.narrow(0, at, place.numel).copy_(weights.read(part.name, part.full_shape, place).flatten())
        if EMA in fragment.states:
            fragment.states[EMA].copy_(target)
    return f"the layers of {source}; embedding and head begin untrained" if weights.partial else f"all of {source}"


def _open(path: Path, config: Config, mine: dict[str, Any], optimizer: Optimizer, groups: Groups) -> Weights:
    if (path / "config.json").exists():
        weights = HuggingFaceWeights(path, config.model)
        if weights.kind == BITLM:
            chunk = optimizer.chunks[0]
            assert isinstance(chunk, BitInput)
            check_bitlm(weights, config, None if isinstance(chunk.codec, RawCodec) else chunk.codec.table.cpu())
        return weights
    folder = newest_checkpoint(path)
    if found := problems(folder, groups.rank, groups.dims.world_size):
        raise UserError(f"train.init_from {path}: {found[0]}")
    keys = ("model", "diffusion.self_condition above 0", "vocabulary size", "code table", "tokenizer")
    compare(read_meta(folder)["identity"], {key: mine[key] for key in keys}, f"train.init_from {folder}")
    return CheckpointWeights(folder)


def check_bitlm(weights: HuggingFaceWeights, config: Config, table: Tensor | None) -> None:
    """UserError for another model than this run's. table: of the codes, int8 [V, B]; None for raw records."""
    m, there = config.model, weights.config
    if (table is None) != (there.get("vocab_size") == 0):
        kind = "tokens with a vocabulary" if table is None else "raw records"
        raise UserError(f"model.code is {m.code}, and {weights.folder} is a model of {kind}")
    for key, value, other in (
        ("model.bits", m.bits, there.get("bits")),
        ("model.block_size", m.block_size, there.get("block_size")),
        ("model.attention", m.attention, "block_causal" if there.get("block_causal") else "causal"),
        ("model.num_layers", m.num_layers, there.get("num_hidden_layers")),
        ("model.num_heads", m.num_heads, there.get("num_attention_heads")),
        ("model.num_kv_heads", m.num_kv_heads, there.get("num_key_value_heads")),
        ("model.head_dim", m.attention_head_dim, head_dim_of(there)),
        ("model.qk_norm", m.qk_norm, there.get("qk_norm")),
        ("model.norm_eps", m.norm_eps, there.get("rms_norm_eps")),
        ("model.head.kind", m.head.kind, there.get("head_kind")),
        ("model.head.prior", m.head.prior, there.get("head_prior")),
        ("model.head.window", m.head.window, there.get("head_window")),
        ("model.group_bits", list(m.group_sizes), there.get("group_sizes")),
        ("model.head.num_layers", m.head.num_layers, there.get("head_num_layers")),
        ("model.head.num_heads", m.head.num_heads, there.get("head_num_attention_heads")),
    ):
        if value != other:
            raise UserError(f"{key} is {value}, and {weights.folder} has {other}; set {key}={str(other).lower()}")
    shown = bool(there.get("self_condition", False))
    if shown != (config.diffusion.self_condition > 0):
        raise UserError(
            f"diffusion.self_condition is {config.diffusion.self_condition}, and {weights.folder} was trained "
            f"{'with' if shown else 'without'} it; set diffusion.self_condition={0.5 if shown else 0}"
        )
    if table is not None and not torch.equal(weights.code_table(), table):
        raise UserError(
            f"{weights.folder} has another table of codes than this run (model.code, model.bits and the vocabulary of "
            "data.path make it); its weights would mean other tokens"
        )
