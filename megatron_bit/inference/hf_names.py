"""A checkpoint in transformers' terms: its tensors one by one, and its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_bit.checkpoint.hf_parts import Part, parts
from megatron_bit.checkpoint.index import Reader, Rectangle
from megatron_bit.checkpoint.load import open_reader
from megatron_bit.config import Config, config_from_dict
from megatron_bit.data.manifest import Manifest, load_manifest
from megatron_bit.diffusion.entropy_rate import EntropyRate
from megatron_bit.diffusion.noise import build_noise
from megatron_bit.errors import UserError
from megatron_bit.model.codec import Codec, learned_table
from megatron_bit.optim.optimizer import EMA
from megatron_bit.run.checkpoints import check_undamaged, read_meta
from megatron_bit.run.folder import newest_checkpoint, vocabulary_of

CODE_TABLE = "model.code_table"
WeightsOf = Literal["trained", "ema"]


class Source:
    """A checkpoint to read weights from, with the data folder's tokenizer. Raw records have neither."""

    def __init__(self, run: Path, data: str | None = None, weights: WeightsOf = "trained") -> None:
        """
        Args:
            run: a run folder (its newest complete checkpoint) or a checkpoint folder.
            data: folder with the run's tokenizer, if it has moved since.
            weights: the newest ones, or their running average (`optim.ema_decay`).

        Raises:
            UserError: no complete checkpoint, a damaged one, one without such weights, or the tokenizer is gone or
                another one.
        """
        self.folder = newest_checkpoint(run)
        check_undamaged(self.folder)
        meta = read_meta(self.folder)
        config = config_from_dict(meta["config"])
        if weights == "ema" and not config.optim.ema_decay:
            raise UserError(
                f"checkpoint {self.folder} has no average of the weights (optim.ema_decay is 0 there); leave out "
                "--weights ema"
            )
        if config.model.head.kind == "softmax" and config.model.memory.rows:
            raise UserError(
                f"checkpoint {self.folder} is of a softmax peer with model.memory, which no model of transformers has; "
                "its losses are in the run's log.jsonl and validation.jsonl"
            )
        self.weights = weights
        self.step = int(meta["step"])
        self.identity: dict[str, Any] = meta["identity"]
        self.noise_table: dict[str, Any] | None = meta.get("noise_table")
        self.config: Config = config
        self.code_table: Tensor | None = None  # int8 [V, B]; a softmax model and one of records have none
        self.vocab_size = 0
        if self.records:
            if data is not None:
                raise UserError(f"--data {data} has no use here: {run} is of raw records, without a tokenizer")
            return
        self.manifest: Manifest = load_manifest(data or vocabulary_of(config, self.folder), check_files=False)
        if self.manifest.tokenizer_sha256 != meta["identity"]["tokenizer"]:
            raise UserError(
                f"the tokenizer of {self.manifest.folder} is not the one of {self.folder}; give the run's data folder"
            )
        self.manifest.checked_tokenizer_path()  # before anything else is done
        self.vocab_size = self.manifest.vocab_size
        self.config = config.with_vocab_size(self.vocab_size)
        if self.softmax:
            return
        m = self.config.model
        learned = learned_table(m.code, self.manifest, m.bits)
        codec = Codec(m.code, self.manifest.vocab_size, m.bits, learned)
        if codec.fingerprint != meta["identity"]["code table"]:
            raise UserError(
                f"checkpoint {self.folder} was trained with another table of codes than model.code="
                f"{m.code} makes here; its tokens would be read wrongly"
            )
        self.code_table = codec.table

    @property
    def softmax(self) -> bool:
        """Whether it is of the autoregressive peer."""
        return self.config.model.head.kind == "softmax"

    @property
    def records(self) -> bool:
        """Whether its tokens are raw records."""
        return self.config.model.code == "raw"

    def parts(self) -> list[Part]:
        """All weights, a layer's side by side."""
        return list(parts(self.config))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor) of all parts, one at a time, and a BitLM's code table at the end.

        Raises:
            UserError: a tensor is missing, incomplete or of another shape.
        """
        reader, group = open_reader(self.folder), ""
        for part in self.parts():
            layer = part.logical.partition(".layers.")[2].partition(".")[0]
            if layer != group:  # a reader keeps what it has read mapped into memory: begin anew
                reader, group = open_reader(self.folder), layer
            yield part.name, _read(reader, part, EMA if self.weights == "ema" else "param")
        if self.code_table is not None:
            yield CODE_TABLE, self.code_table


def _read(reader: Reader, part: Part, state: str) -> Tensor:
    shape = reader.shape(part.logical)
    if shape != part.logical_shape:
        raise UserError(
            f"checkpoint tensor {part.logical} has shape {shape}, the configuration wants {part.logical_shape}; it is "
            "of another model"
        )
    return part.cut(reader.read(part.logical, state, Rectangle((0,) * len(shape), shape)))


def _layers(config: Config) -> dict[str, object]:
    """What transformers' configurations of the Llama layout, and ours, call the backbone."""
    m = config.model
    return {
        "hidden_size": m.hidden_size,
        "intermediate_size": m.ffn_hidden_size,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "head_dim": m.attention_head_dim,
        "max_position_embeddings": config.data.seq_length,
        "rms_norm_eps": m.norm_eps,
        "rope_theta": m.rope_base,
        "initializer_range": m.init_std,
    }


def model_arguments(config: Config, vocab_size: int, noise_table: dict[str, Any] | None = None) -> dict[str, object]:
    """Keyword arguments of BitLMConfig.

    Args:
        vocab_size: 0 for raw records.
        noise_table: of the checkpoint; without it a measured distribution is that of an untrained model.
    """
    m, d = config.model, config.diffusion
    noise = build_noise(config, torch.device("cpu"))
    if isinstance(noise, EntropyRate) and noise_table is not None:
        noise.load(noise_table)
    return {
        "vocab_size": vocab_size,
        "bits": m.bits,
        "block_size": m.block_size,
        "block_causal": m.attention == "block_causal",
        **_layers(config),
        "qk_norm": m.qk_norm,
        "head_hidden_size": m.head.hidden_size,
        "head_intermediate_size": m.head.ffn_hidden_size,
        "head_num_layers": m.head.num_layers,
        "head_num_attention_heads": m.head.num_heads,
        "head_kind": m.head.kind,
        "head_prior": m.head.prior,
        "head_window": m.head.window,
        "group_sizes": list(m.group_sizes),
        "names": "pairs" if m.pairs else "sum",
        "prior_rank": m.prior_rank,
        "token_before": m.token_before,
        "soft_prior": m.soft_prior,
        "memory_rows": m.memory.rows,
        "memory_orders": list(m.memory.orders),
        "memory_hashes": m.memory.hashes,
        "matched_filter": d.parameterization == "matched_filter",
        "sigma_min": d.sigma_min,
        "sigma_max": d.sigma_max,
        "sigma_log_mean": d.log_mean,
        "sigma_log_std": d.log_std,
        "sigma_kind": d.noise,
        "sigma_masses": noise.masses.tolist() if isinstance(noise, EntropyRate) else None,
        "levels_apart": d.levels_apart > 0,
        "noisy_blocks": config.noisy_every > 0,
        "condition_drop": d.condition_drop,
        "self_condition": d.self_condition > 0,
    }


def softmax_config(config: Config, **more: Any) -> Any:
    """What a softmax model is in transformers: a Qwen3Config, or a LlamaConfig without norms of queries and keys.

    The vocabulary has to be known. more: further keyword arguments of it.
    """
    import transformers

    m, kind = config.model, "Qwen3" if config.model.qk_norm else "Llama"
    arguments = {
        "vocab_size": m.vocab_size,
        **_layers(config),
        "tie_word_embeddings": False,
        "architectures": [f"{kind}ForCausalLM"],
    }
    return getattr(transformers, f"{kind}Config")(**{**arguments, **more})


def training_dtype(config: Config) -> torch.dtype:
    """The dtype in which the run computed."""
    return torch.bfloat16 if config.bf16 else torch.float32
