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
UNGUIDED = "needs a model trained with diffusion.condition_drop above 0, and this one was not; leave it out, or 1"
# of a whole token: a chain's token after token, of a joint head's none
WHOLE = {"do_sample": None, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
NEUTRAL = {  # what says that nothing is asked for
    **WHOLE, "do_sample": True, "use_cache": True, "num_beams": 1, "return_dict_in_generate": False,
    "output_scores": False, "length_penalty": 1.0, "early_stopping": False, "no_repeat_ngram_size": 0, "typical_p": 1.0,
    "num_beam_groups": 1, "diversity_penalty": 0.0, "min_length": 0, "num_return_sequences": 1,
    "encoder_repetition_penalty": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "output_attentions": False,
    "output_hidden_states": False, "output_logits": False,
}  # fmt: skip


def _neutral(name: str, value: Any) -> bool:
    return name in NEUTRAL and (value is None or value == NEUTRAL[name])


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
    top_k: int
    top_p: float
    repetition_penalty: float
    min_new_tokens: int
    greedy: bool  # the likeliest token, and not the likeliest value of each group
    copies: int  # of each prompt
    decoder: Decoder | None  # where there are stop strings

    @property
    def tokenwise(self) -> bool:
        """Whether the distribution of whole tokens is needed."""
        other = self.top_k or self.top_p < 1.0 or self.repetition_penalty != 1.0 or self.min_new_tokens
        return bool(self.greedy or other)

    @classmethod
    def read(
        cls,
        base: GenerationConfig | None,
        kwargs: dict[str, Any],
        length: int,
        tokenizer: Any,
        kind: str,
        records: bool,
    ) -> Settings:
        values: dict[str, Any] = {
            "max_new_tokens": 128, "seed": None, "steps": 16, "sampler": "em", "temperature": 1.0, "guidance": 1.0,
            "ahead": 0, "overlap": 0.0, "num_return_sequences": 1, **WHOLE,
        }  # fmt: skip
        other = {"temperature", "ahead", "overlap", *WHOLE}
        if kind == "chain":
            values["steps"] = 0  # as many as a block has groups
            front = kwargs.get("overlap") or getattr(base, "overlap", 0)
            other = {"sampler"} if front else {"sampler", "steps"}
            other |= {*WHOLE} if records else set()
        ends = set() if records else {"eos_token_id", "pad_token_id", "stop_strings"}
        known = {*values, "max_length", *ends} - other
        aside = {"transformers_version", "bos_token_id", "_from_model_config"}
        own = {k: v for k, v in (base.to_diff_dict() if base is not None else {}).items() if k not in aside}
        own = {k: v for k, v in own.items() if kwargs.get(k) is None}
        own, kwargs = ({k: v for k, v in given.items() if not _neutral(k, v)} for given in (own, kwargs))
        if "max_length" in kwargs:
            own.pop("max_new_tokens", None)
        unknown = sorted({*own, *kwargs} - known)
        if unknown:
            raise ValueError(
                f"generate: {unknown[0]} means nothing to a BitLM with a {kind} head{' over records' * records}; it "
                f"knows {', '.join(sorted(known))}"
            )
        for source in (own, {k: v for k, v in kwargs.items() if v is not None}):
            values.update(copy.copy(source))
        most = values.get("max_length")
        if most is not None and "max_new_tokens" not in {**own, **kwargs}:
            values["max_new_tokens"] = int(most) - length
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
        if values["seed"] is None:  # of torch's own generator, so that torch.manual_seed and set_seed decide it
            values["seed"] = int(torch.randint(2**62, ()))
        if values["do_sample"] is False:
            values["temperature"] = 0.0
        made = cls(
            int(values["max_new_tokens"]), frozenset(eos), pad, stops, int(values["seed"]), int(values["steps"]),
            str(values["sampler"]), float(values["temperature"]), float(values["guidance"]),
            int(values["ahead"]), float(values["overlap"]), int(values["top_k"]), float(values["top_p"]),
            float(values["repetition_penalty"]), int(values["min_new_tokens"]), values["do_sample"] is False,
            int(values["num_return_sequences"]), Decoder.of(tokenizer) if stops else None,
        )  # fmt: skip
        made.check()
        return made

    def check(self) -> None:
        """ValueError for what is out of its range, or cannot be meant together."""
        for name, right, allowed in (
            ("top_k", self.top_k >= 0, "0 (all) or above"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0, and at most 1 (all)"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < math.inf, "above 0; 1 is none"),
            ("min_new_tokens", self.min_new_tokens >= 0, "0 or above"),
        ):
            if not right:
                raise ValueError(f"generate: {name}={getattr(self, name)} has to be {allowed}")
        if self.copies < 1:
            raise ValueError(f"generate: num_return_sequences={self.copies} has to be at least 1")
        if self.tokenwise and (self.guidance != 1.0 or self.ahead or self.overlap):
            raise ValueError(
                "generate: do_sample=False, top_k, top_p, repetition_penalty and min_new_tokens are of whole tokens, "
                "and guidance, ahead and overlap of groups of bits; leave out one or the other (temperature=0 is the "
                "likeliest value of each group)"
            )


def _check_overlap(values: dict[str, Any]) -> None:
    overlap = float(values["overlap"])
    if overlap and not overlap >= 1.0:
        raise ValueError(f"generate: overlap={values['overlap']} has to be 0 (no front: the chain), or 1 or above")
    if overlap and int(values["ahead"]):
        raise ValueError(
            f"generate: ahead={values['ahead']} guesses what a chain draws, and overlap={overlap:g} is none"
        )
