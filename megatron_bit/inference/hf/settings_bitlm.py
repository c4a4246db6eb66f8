"""What `generate` is asked for."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from .noise_bitlm import SAMPLERS
from .text_bitlm import Decoder

NO_FRONT = "needs a chain trained with diffusion.noisy_every above 0, and this model is none; leave it out"
# what clients of transformers send and that changes nothing here; another value is refused by its name
NEUTRAL: dict[str, Any] = {
    "do_sample": True, "use_cache": True, "num_beams": 1, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0,
    "typical_p": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "min_p": 0.0,
}  # fmt: skip
UNGUIDED = "needs a model trained with diffusion.condition_drop above 0, and this one was not; leave it out, or 1"


@dataclass
class Settings:
    """How texts are drawn."""

    max_new_tokens: int
    eos: frozenset[int]
    pad: int
    stop_strings: tuple[str, ...]
    seed: int
    steps: int
    sampler: str
    temperature: float
    guidance: float
    ahead: int
    overlap: float
    decoder: Decoder | None  # where there are stop strings

    @classmethod
    def read(
        cls, base: GenerationConfig | None, kwargs: dict[str, Any], given: int, tokenizer: Any, kind: str, records: bool
    ) -> Settings:
        values: dict[str, Any] = {
            "max_new_tokens": 128, "seed": None, "steps": 16, "sampler": "em", "temperature": 1.0, "guidance": 1.0,
            "ahead": 0, "overlap": 0.0,
        }  # fmt: skip
        other = {"temperature", "ahead", "overlap"}
        if kind == "chain":
            values["steps"] = 0  # as many as a block has groups
            front = kwargs.get("overlap") or getattr(base, "overlap", 0)
            other = {"sampler"} if front else {"sampler", "steps"}
        ends = set() if records else {"eos_token_id", "pad_token_id", "stop_strings"}
        known = {*values, "max_length", *ends} - other
        aside = {"transformers_version", "bos_token_id", "_from_model_config", "num_return_sequences"}
        own = {k: v for k, v in (base.to_diff_dict() if base is not None else {}).items() if k not in aside}
        own, kwargs = (_without_neutral(source) for source in (own, kwargs))
        greedy = kind == "chain" and kwargs.pop("do_sample", None) is False
        if "max_length" in kwargs:
            own.pop("max_new_tokens", None)
        unknown = sorted({*own, *kwargs} - known)
        if unknown:
            raise ValueError(
                f"generate: {unknown[0]} means nothing to a BitLM with a {kind} head{' over records' * records}; it "
                f"knows {', '.join(sorted(known))}"
            )
        for source in (own, kwargs):
            values.update(copy.copy(source))
        if greedy:  # whatever temperature the model's own configuration has
            values["temperature"] = 0.0
        if values["seed"] is None:  # fresh, and torch.manual_seed (transformers' set_seed) makes it the same again
            values["seed"] = int(torch.randint(2**62, ()))
        length = values.get("max_length")
        if length is not None and "max_new_tokens" not in {**own, **kwargs}:
            values["max_new_tokens"] = int(length) - given
        eos = values.get("eos_token_id")
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        pad = values.get("pad_token_id")
        stops = values.get("stop_strings") or ()
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if stops and tokenizer is None:
            raise ValueError("generate: stop_strings need the tokenizer as well (tokenizer=...)")
        least = 2 if kind == "diffusion" else 1
        if ("steps" in {**own, **kwargs} or least == 2) and int(values["steps"]) < least:
            raise ValueError(f"generate: steps={values['steps']} has to be at least {least}")
        if int(values["max_new_tokens"]) < 1:
            raise ValueError(f"generate: max_new_tokens={values['max_new_tokens']} has to be at least 1")
        _check_overlap(values)
        if not 0.0 <= float(values["temperature"]) < math.inf:
            raise ValueError(f"generate: temperature={values['temperature']} has to be 0 (the likeliest) or above")
        if not 0.0 <= float(values["guidance"]) < math.inf:
            raise ValueError(f"generate: guidance={values['guidance']} has to be 0 (no condition) or above; 1 is none")
        if int(values["ahead"]) < 0:
            raise ValueError(f"generate: ahead={values['ahead']} has to be 0 (one group after another) or above")
        if values["sampler"] not in SAMPLERS:
            raise ValueError(
                f"generate: sampler={values['sampler']!r} does not exist; choose one of {', '.join(SAMPLERS)}"
            )
        pad = pad if pad is not None else eos[0] if eos else 0
        return cls(
            int(values["max_new_tokens"]), frozenset(eos), pad, stops, int(values["seed"]), int(values["steps"]),
            str(values["sampler"]), float(values["temperature"]), float(values["guidance"]),
            int(values["ahead"]), float(values["overlap"]), Decoder.of(tokenizer) if stops else None,
        )  # fmt: skip


def _without_neutral(values: dict[str, Any]) -> dict[str, Any]:
    given = {k: v for k, v in values.items() if v is not None}
    return {k: v for k, v in given.items() if not (k in NEUTRAL and v == NEUTRAL[k] and type(v) is type(NEUTRAL[k]))}


def _check_overlap(values: dict[str, Any]) -> None:
    overlap = float(values["overlap"])
    if overlap and not overlap >= 1.0:
        raise ValueError(f"generate: overlap={values['overlap']} has to be 0 (no front: the chain), or 1 or above")
    if overlap and int(values["ahead"]):
        raise ValueError(
            f"generate: ahead={values['ahead']} guesses what a chain draws, and overlap={overlap:g} is none"
        )
