"""`megatron-bit generate`: from a run, a checkpoint or a converted folder, all through hf/modeling_bitlm.py."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from mbit_data.tokenizer import Tokenizer
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, TextStreamer
from transformers.utils import logging as transformers_logging

from megatron_bit.errors import UserError
from megatron_bit.inference.hf.modeling_bitlm import SAMPLERS, UNGUIDED, BitLMConfig, BitLMForCausalLM
from megatron_bit.inference.hf_names import Source, WeightsOf, model_arguments, training_dtype

__all__ = ["SAMPLERS", "Generator", "main"]

_ENDED = -1  # no token: what a row of a batch holds behind its end


class _Text(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int], **_: Any) -> str: ...


class _SentencePiece:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode = tokenizer.encode
        self._tokenizer = tokenizer

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return self._tokenizer.decode(ids)


class _Converted:
    def __init__(self, folder: Path) -> None:
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text)["input_ids"]  # type: ignore[return-value]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class Generator:
    """A model in evaluation mode on the accelerator, or the CPU if there is none, with its tokenizer."""

    def __init__(self, run: Path, data: str | None = None, weights: WeightsOf = "trained") -> None:
        """
        Args:
            run: a run folder (its newest complete checkpoint), a checkpoint folder, or a converted folder.
            data: folder with the run's tokenizer, if it has moved since; a converted folder has its own.
            weights: of a run, the newest ones or their running average; a converted folder has one of them.

        Raises:
            UserError: no complete checkpoint or no average, a softmax model, the tokenizer is gone or another one, or a
                damaged converted folder.
        """
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: BitLMForCausalLM
        self.text: _Text
        if (run / "config.json").exists():
            if data is not None:
                raise UserError(f"--data {data} has no use here: {run} is a converted folder with its own tokenizer")
            if weights != "trained":
                raise UserError(
                    f"--weights {weights} has no use here: {run} is a converted folder; `megatron-bit convert "
                    f"--weights {weights}` makes one of them"
                )
            self._open_converted(run)
        else:
            source = Source(run, data, weights)
            if source.softmax:
                raise UserError(
                    f"{run} has a softmax head, and this generates from BitLMs: `megatron-bit convert {run} --to hf "
                    "DIR` makes of it what transformers generates from"
                )
            self._open_checkpoint(source)
        self.model.to(self.device).eval()  # type: ignore[arg-type]

    def _open_checkpoint(self, source: Source) -> None:
        arguments: dict[str, Any] = model_arguments(source.config, source.manifest.vocab_size, source.noise_table)
        with torch.device("meta"):
            self.model = BitLMForCausalLM(BitLMConfig(**arguments))
        dtype = training_dtype(source.config)
        weights: dict[str, Tensor] = {}
        for name, tensor in source.tensors():
            weights[name] = tensor.to(self.device, dtype if tensor.is_floating_point() else None)
        self.model.load_state_dict(weights, assign=True)
        tokenizer = Tokenizer(source.manifest.tokenizer_path)
        self.model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.eos_id)
        self.text, self.step = _SentencePiece(tokenizer), source.step

    def _open_converted(self, folder: Path) -> None:
        transformers_logging.disable_progress_bar()
        try:
            kind = json.loads((folder / "config.json").read_text()).get("model_type")
            if kind != "bitlm":
                raise UserError(
                    f"{folder} is a model of type {kind}, not bitlm; give a run or a converted BitLM, or generate with "
                    "transformers"
                )
            loaded: Any = BitLMForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
            self.model, found = loaded
            self.text = _Converted(folder)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"converted folder {folder} cannot be read: {error}") from None
        wrong = sorted(map(str, [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]))
        if wrong:
            raise UserError(f"converted folder {folder}: {len(wrong)} tensors are missing or wrong, such as {wrong[0]}")
        self.step = int(getattr(self.model.config, "training_step", 0))

    def generate(
        self,
        prompts: Sequence[str],
        max_tokens: int,
        *,
        seed: int = 0,
        sequences: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        show: bool = False,
        **how: Any,
    ) -> list[dict[str, Any]]:
        """Continue prompts, together; each stops at the end-of-document token or behind a stop string.

        Args:
            sequences: keys of the noise, one a prompt (default 0, 1, ...); a (seed, sequence) has one text.
            show: print the text as it comes; one prompt only.
            how: steps and sampler of a diffusion head, temperature of a chain head, guidance of both; the model's own
                where not given.

        Returns:
            for every prompt a dict: prompt, text, tokens (produced for it), seconds (of all together),
            seconds_to_first_block, tokens_per_second (of all together), step.
        """
        watch = _Watch(TextStreamer(self.text) if show else None)  # type: ignore[arg-type]
        rows = [self.text.encode(prompt) for prompt in prompts]
        produced = self.run(rows, max_tokens, streamer=watch, seed=seed, sequences=sequences, stop=stop, **how)
        seconds = time.perf_counter() - watch.begin
        rate = sum(map(len, produced)) / seconds
        return [
            {
                "prompt": prompt,
                "text": self.text.decode(new),
                "tokens": len(new),
                "seconds": round(seconds, 3),
                "seconds_to_first_block": round(watch.first, 3),
                "tokens_per_second": round(rate, 1),
                "step": self.step,
            }
            for prompt, new in zip(prompts, produced, strict=True)
        ]

    def run(
        self,
        rows: Sequence[Sequence[int]],
        max_tokens: int,
        *,
        streamer: Any,
        seed: int,
        sequences: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        **how: Any,
    ) -> list[list[int]]:
        """Continue rows of token ids; returns the new ids of each. `streamer` gets what transformers' streamers get."""
        pad, width = self.eos_id, max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + [*row] for row in rows], dtype=torch.int64)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out = self.model.generate(
            ids.view(len(rows), width),
            attention_mask=mask.view(len(rows), width),
            max_new_tokens=max_tokens,
            streamer=streamer,
            tokenizer=self.text,
            sequence_ids=sequences,
            stop_strings=list(stop),
            pad_token_id=_ENDED,
            seed=seed,
            **how,
        )
        return [[token for token in row if token != _ENDED] for row in out[:, width:].tolist()]

    def check(self, how: Mapping[str, Any]) -> None:
        """UserError, which begins with the name, for what this model's head does not know."""
        kind = self.model.config.head_kind
        known = ["temperature", "guidance"] if kind == "chain" else ["steps", "sampler", "guidance"]
        for name in sorted(how.keys() - set(known)):
            raise UserError(f"{name} means nothing to a {kind} head; it has {', '.join(known[:-1])} and {known[-1]}")
        if how.get("guidance", 1.0) != 1.0 and not self.model.config.condition_drop:
            raise UserError(f"guidance {how['guidance']:g} {UNGUIDED}")

    @property
    def eos_id(self) -> int:
        """The end-of-document token."""
        eos = self.model.generation_config.eos_token_id  # type: ignore[union-attr]
        return eos[0] if isinstance(eos, list) else eos  # type: ignore[return-value]

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self.model.config.vocab_size)


class _Watch:
    """A streamer that takes the time, and passes on."""

    def __init__(self, inner: Any) -> None:
        self.begin, self.first, self._inner = time.perf_counter(), 0.0, inner
        self._puts = 0

    def put(self, value: Tensor) -> None:
        self._puts += 1
        if self._puts == 2:  # the first is the prompt
            self.first = time.perf_counter() - self.begin
        if self._inner is not None:
            self._inner.put(value)

    def end(self) -> None:
        if self._inner is not None:
            self._inner.end()


def main(
    run: Path,
    prompts: Sequence[str],
    max_tokens: int,
    *,
    seed: int,
    data: str | None,
    batch_size: int,
    stop: Sequence[str],
    show: bool,
    weights: WeightsOf,
    how: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Generate for every prompt, `batch_size` at a time; prompt i has sequence i, whatever the batch."""
    generator = Generator(run, data, weights)
    generator.check(how)
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        sequences = range(start, start + len(some))
        yield from generator.generate(some, max_tokens, seed=seed, sequences=sequences, stop=stop, show=show, **how)
