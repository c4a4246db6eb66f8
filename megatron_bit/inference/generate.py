"""`megatron-bit generate`: from a run, a checkpoint or a converted folder, all through the model in hf/."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch
from mbit_kernels import choice
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from megatron_bit.checkpoint.hf_config import read_json
from megatron_bit.checkpoint.huggingface import check_shapes
from megatron_bit.errors import UserError
from megatron_bit.inference.hf.configuration_bitlm import BitLMConfig
from megatron_bit.inference.hf.modeling_bitlm import BitLMForCausalLM
from megatron_bit.inference.hf.noise_bitlm import SAMPLERS
from megatron_bit.inference.hf.settings_bitlm import NO_FRONT, UNGUIDED
from megatron_bit.inference.hf.text_bitlm import TextStream
from megatron_bit.inference.hf_names import Source, WeightsOf, model_arguments, training_dtype
from megatron_bit.inference.text import DataText, FolderText, Records, Text
from megatron_bit.io.files import lines_of
from megatron_bit.model.kernels import device_name, function, missing

__all__ = ["SAMPLERS", "Generator", "main"]

_ENDED = -1  # no token: what a row of a batch holds behind its end


def check_compiler(device: torch.device) -> None:
    """UserError if torch.compile cannot work on this device."""
    reason = missing("compiled", device)
    if reason:
        raise UserError(f"--compile is not possible here: {reason}; leave it out")


class Generator:
    """A model in evaluation mode on the accelerator, or the CPU if there is none, with its tokenizer."""

    def __init__(
        self, run: Path, data: str | None = None, weights: WeightsOf = "trained", compiled: bool = False
    ) -> None:
        """
        Args:
            run: a run folder (its newest complete checkpoint), a checkpoint folder, or a converted folder.
            data: folder with the run's tokenizer, if it has moved since; a converted folder has its own.
            weights: of a run, the newest ones or their running average; a converted folder has one of them.
            compiled: run the backbone and the head through torch.compile; the first texts wait for it.

        Raises:
            UserError: no complete checkpoint or no average, a softmax model, the tokenizer is gone or another one, a
                damaged converted folder, or no C++ compiler where `compiled` needs one.
        """
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: BitLMForCausalLM
        self.text: Text
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
        self.bind_decoding()
        if compiled:
            check_compiler(self.device)
            self.model.compile_parts()

    def bind_decoding(self) -> None:
        """Give the model the form of decoding that was measured as the fastest on a device of this name."""
        posterior: Any = self.model.posterior
        name = "nearest_token"
        form = choice.chosen((name,), device_name(self.device), "auto", choice.measurements())[name]
        if form != "plain" and not posterior.groups:
            posterior.nearest_token = function(name, form)

    def _open_checkpoint(self, source: Source) -> None:
        arguments: dict[str, Any] = model_arguments(source.config, source.vocab_size, source.noise_table)
        with torch.device("meta"):
            self.model = BitLMForCausalLM(BitLMConfig(**arguments))
        dtype = training_dtype(source.config)
        weights: dict[str, Tensor] = {}
        for name, tensor in source.tensors():
            weights[name] = tensor.to(self.device, dtype if tensor.is_floating_point() else None)
        self.model.load_state_dict(weights, assign=True)
        self.step, how = source.step, source.config.generation
        if source.records:
            self.model.generation_config = GenerationConfig(**how)
            self.text = Records(self.model.config.bits)
            return
        self.text = text = DataText(source.manifest.checked_tokenizer_path())
        self.model.generation_config = GenerationConfig(eos_token_id=text.eos_id, pad_token_id=text.eos_id, **how)

    def _open_converted(self, folder: Path) -> None:
        transformers_logging.disable_progress_bar()
        try:
            values = read_json(folder / "config.json")
            kind = values.get("model_type")
            if kind != "bitlm":
                raise UserError(
                    f"{folder} is a model of type {kind}, not bitlm; give a run or a converted BitLM, or generate with "
                    "transformers"
                )
            _check_values(folder, values)
            check_shapes(folder, values)
            loaded: Any = BitLMForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
            self.model, found = loaded
            vocabulary, bits = self.model.config.vocab_size, self.model.config.bits
            self.text = FolderText.converted(folder) if vocabulary else Records(bits)
        except UserError:
            raise
        except Exception as error:  # whatever transformers makes of a value of another type
            raise UserError(f"converted folder {folder} cannot be read: {type(error).__name__}: {error}") from None
        wrong = sorted(map(str, [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]))
        if wrong:
            raise UserError(f"converted folder {folder}: {len(wrong)} tensors are missing or wrong, such as {wrong[0]}")
        _check_generation(folder, self.model, self.text)
        step = getattr(self.model.config, "training_step", 0)
        self.step = step if type(step) is int and step >= 0 else 0

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
        """Continue prompts, together; each ends at the end-of-document token or with the first stop string in its text.

        Args:
            sequences: keys of the noise, one a prompt (default 0, 1, ...); a (seed, sequence) has one text.
            show: print prompt and text, this as it comes; one prompt only.
            how: steps and sampler of a diffusion head, temperature of a chain head, guidance of both; the model's own
                where not given.

        Returns:
            for every prompt a dict: prompt, text, tokens (produced for it), seconds (of all together),
            seconds_to_first_block, tokens_per_second (of all together), step.
        """
        rows = [self.text.encode(prompt) for prompt in prompts]
        watch = _Watch(_Printed(self, prompts[0], rows[0], stop) if show else None)
        produced = self.run(rows, max_tokens, streamer=watch, seed=seed, sequences=sequences, stop=stop, **how)
        seconds = time.perf_counter() - watch.begin
        rate = sum(map(len, produced)) / seconds
        return [
            {
                "prompt": prompt if self.records is None or not row else f"{self.text.decode(row)}\n",
                "text": self.text.behind(row, new, stop),
                "tokens": len(new),
                "seconds": round(seconds, 3),
                "seconds_to_first_block": round(watch.first, 3),
                "tokens_per_second": round(rate, 1),
                "step": self.step,
            }
            for prompt, row, new in zip(prompts, rows, produced, strict=True)
        ]

    def run(
        self,
        rows: Sequence[Sequence[Any]],
        max_tokens: int,
        *,
        streamer: Any,
        seed: int,
        sequences: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        **how: Any,
    ) -> list[list[Any]]:
        """Continue rows of token ids, or of records (lists of their bytes); returns the new ones of each.

        `streamer` gets what transformers' streamers get.
        """
        ids, mask = self.padded(rows)
        ends: dict[str, Any] = {}
        if self.records is None:
            ends = {"tokenizer": self.text, "stop_strings": list(stop), "pad_token_id": _ENDED}
        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=max_tokens, streamer=streamer, sequence_ids=sequences, seed=seed,
            **ends, **how,
        )  # fmt: skip
        return [[token for token in row if token != _ENDED] for row in out[:, ids.shape[1] :].tolist()]

    def padded(self, rows: Sequence[Sequence[Any]]) -> tuple[Tensor, Tensor]:
        """Rows as a batch: ids int64 [b, S], or records uint8 [b, S, bytes], padded in front; and the mask [b, S]."""
        count, width = len(rows), max(map(len, rows))
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]).view(count, width)
        if self.records is None:
            ids = [[self.eos_id] * (width - len(row)) + [*row] for row in rows]
            return torch.tensor(ids, dtype=torch.int64).view(count, width), mask
        size = self.records.bytes
        ids = [[[0] * size] * (width - len(row)) + [*row] for row in rows]
        return torch.tensor(ids, dtype=torch.uint8).view(count, width, size), mask

    @property
    def records(self) -> Records | None:
        """What its tokens are if they are raw records; None if they are text."""
        return self.text if isinstance(self.text, Records) else None

    def stream(self, prompt: Sequence[int], stop: Sequence[str], include: bool) -> TextStream:
        """The text of new tokens behind `prompt`, as it comes; `include`: with the stop string that ends it."""
        return TextStream(self.text.decoder, prompt, stop, include)

    def check(self, how: Mapping[str, Any]) -> None:
        """UserError, which begins with the name, for what this model's head does not know."""
        kind = self.model.config.head_kind
        known = ["temperature", "guidance"] if kind == "chain" else ["steps", "sampler", "guidance"]
        if kind == "chain" and "overlap" in how:
            if not self.model.config.noisy_blocks:
                raise UserError(f"overlap {how['overlap']:g} {NO_FRONT}")
            known += ["overlap", "steps"]
        elif kind == "chain" and "steps" in how and self.model.config.noisy_blocks:
            raise UserError(f"steps {how['steps']} of a chain are those of a front; give overlap as well")
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


class _Printed:
    """A streamer that prints a prompt, and the text behind it as it comes."""

    def __init__(self, generator: Generator, prompt: str, row: Sequence[int], stop: Sequence[str]) -> None:
        self._text, self._eos, self._begun = generator.stream(row, stop, include=True), generator.eos_id, False
        print(prompt, end="", flush=True)

    def put(self, value: Tensor) -> None:
        if self._begun:  # the first is the prompt
            print(self._text.add(*(token for token in value.tolist() if token != self._eos)), end="", flush=True)
        self._begun = True

    def end(self) -> None:
        print(self._text.flush(), flush=True)


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


def _check_values(folder: Path, values: dict[str, Any]) -> None:
    """UserError for a config.json whose values are of another type than the class asks for; transformers takes them."""
    for name, kind in get_type_hints(BitLMConfig.__init__).items():
        if name in values and name != "kwargs":
            try:
                TypeAdapter(kind).validate_python(values[name], strict=True)
            except ValidationError as error:
                what = error.errors()[0]["msg"].lower()
                raise UserError(
                    f"{folder}/config.json has {name} {str(values[name])[:60]!r} ({what}); copy it again"
                ) from None


def _check_generation(folder: Path, model: BitLMForCausalLM, text: Any) -> None:
    """UserError for a generation_config.json whose values are of another type, or mean nothing to this model."""
    how: Any = model.generation_config
    eos, vocab_size = how.eos_token_id, model.config.vocab_size
    ends = eos if isinstance(eos, list) else [eos]
    if vocab_size and not (ends and all(type(end) is int and 0 <= end < vocab_size for end in ends)):
        raise UserError(
            f"{folder}/generation_config.json has eos_token_id {str(eos)[:60]}, which is no token; copy it again"
        )
    kinds = {"temperature": (int, float), "guidance": (int, float), "steps": (int,), "seed": (int,), "sampler": (str,)}
    for name, allowed in kinds.items():
        value = getattr(how, name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, allowed)):
            raise UserError(
                f"{folder}/generation_config.json has {name} {str(value)[:60]!r}, which it cannot be; copy it again"
            )
    try:
        model.check_generation(how, text)
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}/generation_config.json: {error}; copy it again") from None


def main(
    run: Path,
    prompts: Sequence[str],
    max_tokens: int,
    *,
    file: tuple[Path, bytes] | None,
    out: Path | None,
    seed: int,
    data: str | None,
    batch_size: int,
    stop: Sequence[str],
    show: bool,
    weights: WeightsOf,
    compiled: bool,
    how: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Generate for every prompt, `batch_size` at a time; prompt i has sequence i, whatever the batch.

    Args:
        file: name and content of a file with further prompts: a text a line, or the records of one prompt.
        out: file for the new records, prompt after prompt; not for text. It may not be there yet.
        compiled: as of `Generator`.
    """
    generator = Generator(run, data, weights, compiled)
    generator.check(how)
    _check_kind(generator, run, out, stop, show)
    prompts = [*prompts, *(_prompts(generator, *file) if file is not None else ())] or [""]
    results = _of_prompts(generator, prompts, max_tokens, batch_size, seed=seed, stop=stop, show=show, **how)
    if out is None:
        yield from results
        return
    try:
        with open(out, "xb") as binary:
            for result in results:
                binary.write(bytes.fromhex(result["text"]))
                yield {**result, "text": "", "out": str(out)}
    except FileExistsError:
        raise UserError(f"--out {out} is there already, and nothing is overwritten; give another name") from None
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from None


def _check_kind(generator: Generator, run: Path, out: Path | None, stop: Sequence[str], show: bool) -> None:
    """UserError for an option that is of text and the model of records, or the other way round."""
    if generator.records is None:
        if out is not None:
            raise UserError(f"--out {out} is for raw records, and {run} writes text; redirect the output instead")
        return
    for option in ("--stop",) * bool(stop) + ("--stream",) * show:
        raise UserError(f"{option} is for text, and {run} makes raw records; leave it out")


def _prompts(generator: Generator, path: Path, content: bytes) -> list[str]:
    if generator.records is not None:
        try:
            return [generator.records.decode(generator.records.split(content))]
        except ValueError as error:
            raise UserError(f"--prompt-file {path}: {error}") from None
    try:
        lines = lines_of(content)
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {path} cannot be read: {error}; give a text file, one prompt a line") from None
    if not lines:
        raise UserError(f"--prompt-file {path} is empty; give one prompt a line")
    return lines


def _of_prompts(
    generator: Generator, prompts: Sequence[str], max_tokens: int, batch_size: int, **more: Any
) -> Iterator[dict[str, Any]]:
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        yield from generator.generate(some, max_tokens, sequences=range(start, start + len(some)), **more)
