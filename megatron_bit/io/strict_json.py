"""JSON that somebody else may have written: bounded, finite, and of a schema before anything is done with it.

Imports no torch.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from megatron_bit.errors import UserError
from megatron_bit.io.text import shown

T = TypeVar("T")
MIB = 2**20

Count = Annotated[int, Field(ge=0, lt=2**62)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PlainName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}$")
]  # of a file: no way out of its folder


def _finite(tree: Any) -> Any:
    """ValueError for an infinity or a NaN anywhere: pydantic looks at those that a schema calls floats only."""
    if isinstance(tree, float) and not math.isfinite(tree):
        raise ValueError(f"{tree} is no finite number")
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        _finite(inner)
    return tree


Finite = AfterValidator(_finite)  # of a tree whose inside has no schema
AnyObject = Annotated[dict[str, Any], Finite]
OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(AnyObject)


def load(path: Path, schema: TypeAdapter[T], what: str, limit: int, advice: str) -> T:
    """The content of a JSON file.

    Args:
        what: it is called in messages.
        limit: bytes.
        advice: what to do.

    Raises:
        UserError: it cannot be read, is larger, is no JSON, nested too deeply or not of the schema; in one line.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise UserError(f"{what} has {size:,} bytes, and {limit:,} are the most that one can have; {advice}")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror or error}; {advice}") from None
    return parse(data, schema, what, limit, advice)


def parse(data: bytes, schema: TypeAdapter[T], what: str, limit: int, advice: str) -> T:
    """The same of bytes that are in memory already."""
    if len(data) > limit:
        raise UserError(f"{what} has {len(data):,} bytes, and {limit:,} are the most that one can have; {advice}")
    try:
        return schema.validate_json(data, strict=True)
    except ValidationError as error:
        raise UserError(f"{what} {_first(error)}; {advice}") from None


def tree(data: bytes | str) -> Any:
    """What JSON of our own holds, whose names of files may hold bytes that are no UTF-8. ValueError if it is none."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def fits(content: Any, schema: TypeAdapter[T], what: str, advice: str) -> T:
    """A tree that is read already, if it is of the schema. Raises UserError in one line."""
    try:
        return schema.validate_python(content, strict=True)
    except ValidationError as error:
        raise UserError(f"{what} {_first(error)}; {advice}") from None


def _first(error: ValidationError) -> str:
    first: Any = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return f"is no valid JSON: {shown(first['ctx']['error'])[:120]}"
    key = shown(".".join(map(str, first["loc"])))[:120] or "the whole"
    value = shown(repr(first.get("input")))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and not first["loc"]:  # two values contradict each other
        return f"is damaged: {shown(message)[:300]}"
    return f"is damaged: {key} = {value[:60]}: {message[:1].lower()}{message[1:160]}{more}"
