"""Softmax models: runs of ours, and causal models of transformers. Nothing is downloaded, and no foreign code runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.utils import logging as transformers_logging

from megatron_bit.errors import UserError
from megatron_bit.evaluation.models import Model
from megatron_bit.inference.hf.text_bitlm import Decoder
from megatron_bit.inference.hf_names import Source, WeightsOf, softmax_config, training_dtype
from megatron_bit.inference.text import DataText, FolderText, Text
from megatron_bit.inference.tokenizer_json import check_folder

LONGEST = 2048  # tokens of a row for a model that takes more, or does not say: what a row costs grows with its square


class CausalModel(Model):
    """One token at a time; position 0 has the token that begins a text."""

    head, block_size = "softmax", 1

    def __init__(self, path: Path, model: Any, text: Text, begin: int, eos: int, step: int | None) -> None:
        self.path, self.step, self.eos_id = path, step, eos
        self.context = min(LONGEST, getattr(model.config, "max_position_embeddings", None) or LONGEST)
        self._begin, self._text = begin, text
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self._device).eval()

    def encode(self, text: str) -> list[int]:
        return self._text.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._text.decode(ids)

    @cached_property
    def decoder(self) -> Decoder:
        return self._text.decoder

    def nats(self, rows: Sequence[Sequence[int]], keys: Sequence[int], seed: int) -> list[Tensor]:
        ids, logits = self._logits(rows)
        out = []  # row by row: float32 logits of all rows may be large
        for i, row in enumerate(rows):
            out.append(F.cross_entropy(logits[i, : len(row)].float(), ids[i, : len(row)], reduction="none").cpu())
        return out

    @torch.no_grad()
    def _logits(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids int64 [b, S] and what predicts them, [b, S, V]; filled up behind, which no token can see."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[self._begin] * (width - len(row))] for row in rows], device=self._device)
        inputs = F.pad(ids[:, :-1], (1, 0), value=self._begin)
        return ids, self._model(inputs, attention_mask=torch.ones_like(inputs), use_cache=False).logits

    @torch.no_grad()
    def generate(
        self, rows: Sequence[Sequence[int]], tokens: int, keys: Sequence[int], seed: int, how: Mapping[str, Any]
    ) -> list[list[int]]:
        if len(rows[0]) + tokens > self.context:
            raise UserError(
                f"{len(rows[0])} tokens and {tokens} new ones are more than the {self.context} that {self.path} takes; "
                "generate fewer (--tokens, --prefix)"
            )
        temperature = float(how.get("temperature", 1.0))
        # transformers samples from one generator for all rows: here each has its own
        uniforms = np.stack([np.random.Generator(np.random.Philox(key=[seed, key])).random(tokens) for key in keys])
        ids = torch.tensor([[self._begin, *row] for row in rows], device=self._device)
        cache: Any = None
        for u in torch.from_numpy(uniforms).t():
            inputs = ids if cache is None else ids[:, -1:]
            out = self._model(inputs, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            new = _draw(out.logits[:, -1].double(), u.to(self._device), temperature)
            ids = torch.cat((ids, new[:, None]), dim=1)
        return ids[:, 1 + len(rows[0]) :].tolist()

    def greedy(self, contexts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> list[bool] | None:
        """Greedy generation begins with the target if, and only if, each of its tokens is the likeliest behind it."""
        rows = [[*c, *t][-self.context :] for c, t in zip(contexts, targets, strict=True)]
        ids, logits = self._logits(rows)
        hit = logits.argmax(-1) == ids
        return [bool(h[len(r) - len(t) : len(r)].all()) for h, r, t in zip(hit, rows, targets, strict=True)]

    def check(self, how: Mapping[str, Any]) -> None:
        for name in sorted(how.keys() - {"temperature"}):
            raise UserError(f"{name} means nothing to a softmax head; it has temperature")


def _draw(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    """Tokens int64 [b] from logits [b, V] by uniforms [b]: the inverse of the distribution function."""
    if temperature == 0.0:
        return logits.argmax(-1)
    total = (logits / temperature).softmax(-1).cumsum(-1)
    return (total <= u[:, None] * total[:, -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)


def from_checkpoint(path: Path, checkpoint: Path, data: str | None, weights: WeightsOf) -> CausalModel:
    """A softmax run of ours as the Qwen3 or Llama that `convert` would make of it, in memory."""
    source = Source(checkpoint, data, weights)
    text = DataText(source.manifest.checked_tokenizer_path())
    model = transformers.AutoModelForCausalLM.from_config(softmax_config(source.config))
    model = model.to(training_dtype(source.config))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in source.tensors():
            parameters.pop(name).copy_(tensor)
    assert not parameters, sorted(parameters)
    return CausalModel(path, model, text, text.eos_id, text.eos_id, source.step)


def from_folder(folder: Path) -> CausalModel:
    """A causal model of transformers with its tokenizer.

    Raises:
        UserError: it cannot be read without running code of its own, has no token that begins or ends a text, or was
            converted from a run of ours with another tokenizer.
    """
    check_folder(folder)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what is wrong is said below, in one line
    known = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **known)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **known)
    except Exception as error:  # whatever a foreign folder makes transformers raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{folder} cannot be read as a causal language model of transformers: {reason}") from None
    begin, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    begin, eos = eos if begin is None else begin, begin if eos is None else eos
    if begin is None or eos is None:
        raise UserError(f"the tokenizer of {folder} has no token that begins or ends a text, and the first needs one")
    step = getattr(model.config, "training_step", None)
    return CausalModel(folder, model, FolderText(tokenizer), begin, eos, step)
