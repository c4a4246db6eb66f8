"""Open whatever holds a language model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bit.checkpoint.hf_config import read_json
from megatron_bit.config import Config, config_from_dict
from megatron_bit.data.manifest import load_manifest
from megatron_bit.errors import UserError
from megatron_bit.evaluation import causal
from megatron_bit.evaluation.models import BitModel, Model
from megatron_bit.inference.generate import Generator
from megatron_bit.inference.hf_names import WeightsOf
from megatron_bit.run.checkpoints import read_meta
from megatron_bit.run.folder import newest_checkpoint, vocabulary_of


def open_model(path: Path, data: str | None = None, weights: WeightsOf = "trained") -> Model:
    """A run (its newest checkpoint), a checkpoint, a converted folder, or a causal model of transformers.

    Args:
        data: data folder with the run's tokenizer, in case that it is not where the run had it.
        weights: of a run, the newest ones or their running average.

    Raises:
        UserError: there is no such folder, it is none of these, it cannot be read, or it has no such weights.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give a run, a checkpoint, or a Hugging Face folder")
    if (path / "config.json").exists():
        if weights != "trained":
            raise UserError(f"--weights {weights} has no use here: {path} is a Hugging Face folder, which has one kind")
        if _model_type(path) != "bitlm":
            return causal.from_folder(path)
        return BitModel(path, Generator(path))
    checkpoint = newest_checkpoint(path)
    meta = read_meta(checkpoint)
    config = config_from_dict(meta["config"])
    home = data if config.model.code != "raw" and _moved(config, meta, checkpoint) else None
    if config.model.head.kind == "softmax":
        model: Model = causal.from_checkpoint(path, checkpoint, home, weights)
    else:
        model = BitModel(path, Generator(checkpoint, home, weights))
    model.training, model.tokenizer_sha256 = config, meta["identity"]["tokenizer"]
    model.noise_samples = config.evaluate.noise_samples
    return model


def _model_type(folder: Path) -> str | None:
    kind = read_json(folder / "config.json").get("model_type")
    return kind if isinstance(kind, str) else None


def _moved(config: Config, meta: Mapping[str, Any], checkpoint: Path) -> bool:
    """Whether the run's own tokenizer is no longer there, or is another one by now."""
    try:
        manifest = load_manifest(vocabulary_of(config, checkpoint), check_files=False)
        manifest.checked_tokenizer_path()
    except UserError:
        return True
    return manifest.tokenizer_sha256 != meta["identity"]["tokenizer"]
