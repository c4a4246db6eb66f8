"""MAUVE (Pillutla et al., arXiv 2102.01454), if its library is installed and a model for its features is given."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_bit.errors import UserError
from megatron_bit.evaluation.progress import Progress


def why_not(featurizer: Path | None) -> str | None:
    """The reason for which it cannot be computed; None if it can."""
    if featurizer is None:
        return "no model for its features is given (--mauve-model)"
    try:
        importlib.import_module("mauve")
    except ModuleNotFoundError as error:
        missing = "the library" if error.name == "mauve" else f"{error.name}, which the library needs,"
        return f"{missing} is not installed (pip install mauve-text)"
    return None


def compute(generated: Sequence[str], real: Sequence[str], featurizer: Path, *, seed: int) -> float:
    """MAUVE between two sets of texts, 0 to 1.

    The features of a text are the featurizer's last state at its last token, as in the library, which would download a
    model that it knows by name and takes no other.

    Raises:
        UserError: the featurizer cannot be read.
    """
    mauve: Any = importlib.import_module("mauve")
    features = _Features(featurizer)
    p, q = features("features, generated", generated), features("features, real", real)
    with contextlib.redirect_stdout(io.StringIO()):
        result: Any = mauve.compute_mauve(p_features=p, q_features=q, seed=seed, verbose=False)
    return float(result.mauve)


class _Features:
    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        known: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, **known)
            self._model: Any = AutoModel.from_pretrained(folder, dtype="auto", **known).eval()
        except Exception as error:  # whatever a foreign folder makes transformers raise
            raise UserError(f"--mauve-model {folder} cannot be read: {error!s}") from None
        self._longest = getattr(self._model.config, "max_position_embeddings", None) or 1024

    @torch.no_grad()
    def __call__(self, name: str, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, width]; one at a time, so that nothing depends on padding."""
        rows = []
        for i in Progress(name).over(range(len(texts)), step=1, total=len(texts)):
            ids = self._tokenizer(texts[i] or " ")["input_ids"][: self._longest]
            rows.append(self._model(torch.tensor([ids])).last_hidden_state[0, -1].float())
        return torch.stack(rows).numpy()
