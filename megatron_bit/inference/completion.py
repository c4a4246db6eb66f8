"""The body of a request to /v1/completions: what is taken, what changes nothing, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse

# What OpenAI's API and vLLM know, and a BitLM does not have: accepted with the values that change nothing, because many
# clients always send them. null is the same as nothing for every key.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (1,), "top_k": (-1, 0), "min_p": (0,), "typical_p": (1,), "logit_bias": ({},), "presence_penalty": (0,),
    "frequency_penalty": (0,), "repetition_penalty": (1,), "length_penalty": (1,), "best_of": (1,), "suffix": ("",),
    "echo": (False,), "logprobs": (False,), "prompt_logprobs": (False,), "use_beam_search": (False,),
    "min_tokens": (0,), "ignore_eos": (False,), "stop_token_ids": ([],), "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True, False), "add_special_tokens": (True, False),
}  # fmt: skip


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


class Completion(BaseModel):
    """The body of a request. What would change the text and means nothing to a BitLM is refused, not ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    prompt: str | list[str] | list[int] | list[list[int]] = ""
    max_tokens: int = Field(default=16, ge=1)
    n: int = Field(default=1, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)  # without one every request has another text
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=100.0)
    user: str | None = None  # said to be for the operator's logs; there are none
    steps: int | None = Field(default=None, ge=1, le=1024)
    sampler: str | None = None
    guidance: float | None = Field(default=None, ge=0.0, le=100.0)
    overlap: float | None = Field(default=None, ge=1.0)


class Refused(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    def response(self) -> JSONResponse:
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": None}
        headers = {"Retry-After": "1"} if self.status == 429 else None
        return JSONResponse({"error": error}, self.status, headers)


def read_completion(data: bytes) -> Completion:
    """Refused if it is none."""
    try:
        return _validated(_read_json(data))
    except RecursionError:  # of the parser, or of whatever looks at what it made
        raise Refused(400, "body is nested too deeply") from None


def _validated(given: Any) -> Completion:
    try:
        return Completion.model_validate(_without_neutral(given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(brief(str(part), quoted=False) for part in first["loc"]) or None
        why = {
            "extra_forbidden": "is not known here, or means nothing to a BitLM",
            "missing": "is missing",
        }.get(first["type"], f"= {brief(first.get('input'))}: {first['msg'][:1].lower()}{first['msg'][1:]}")
        raise Refused(400, f"{param or 'body'} {why}", param) from None


def brief(value: Any, quoted: bool = True) -> str:
    """Something of a client's in a message: short, and with nothing in it that a terminal would act on."""
    text = str(value)
    text = text if len(text) <= 80 else f"{text[:80]}..."
    return repr(text) if quoted else text if text.isprintable() else repr(text)[1:-1]


def _read_json(data: bytes) -> Any:
    """JSON as its standard has it, and no key twice: one of the two values would be ignored. Refused otherwise."""
    try:
        tree = json.loads(data.decode(), object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)
        json.dumps(tree, ensure_ascii=False).encode()  # an escaped half of a surrogate pair is no text
    except UnicodeEncodeError:
        raise Refused(400, "body has half of a surrogate pair, which is no character") from None
    except ValueError as error:  # of the decoder, of UTF-8, of int() for thousands of digits
        raise Refused(400, f"body is no JSON: {str(error).partition(';')[0]}") from None
    return tree


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise Refused(400, f"{brief(key, quoted=False)} is there twice", brief(key, quoted=False))
        made[key] = value
    return made


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        _constant(text)
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text[:80]} is no finite number")


def _without_neutral(given: Any) -> Any:
    """A body without what is null, and without what changes nothing. Refused for other values of these keys."""
    if not isinstance(given, dict):
        return given
    given = {key: _without_null(value) for key, value in given.items() if value is not None}
    neutral = dict(NEUTRAL)
    if "best_of" in given and given["best_of"] == given.get("n", 1):
        neutral["best_of"] = (given["best_of"],)  # all that are made are given
    for name in sorted(given.keys() & neutral):
        value, allowed = given.pop(name), neutral[name]
        zeros = name == "logit_bias" and isinstance(value, dict) and not any(value.values())
        same = any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed)
        if not same and not zeros:
            named = " or ".join(json.dumps(each) for each in allowed)
            number = isinstance(value, int | float)
            what = f"{name} {brief(value, quoted=False)}: " if number else f"{name} = {brief(value)}: "
            raise Refused(400, f"{what}a BitLM is served without it; leave it out, or say null or {named}", name)
    return given


def _without_null(value: Any) -> Any:
    return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value
