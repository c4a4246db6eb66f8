"""What the JSON files of a checkpoint may hold. Plain dictionaries come out: an index has millions of entries."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from megatron_bit.io.strict_json import MIB, Count, PlainName, Sha256, load, parse

_LIMITS = {"index.json": 2048 * MIB, "meta.json": 64 * MIB, "hashes.json": 256 * MIB}
_ADVICE = "take another checkpoint, or restore this one from a backup"
_FORBID = ConfigDict(extra="forbid", allow_inf_nan=False)
_FINITE = ConfigDict(allow_inf_nan=False)

Size = Annotated[int, Field(ge=0, lt=2**48)]
Sizes = Annotated[list[Size], Field(max_length=8)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@with_config(_FORBID)
class Rectangle(TypedDict):
    """A box of a logical tensor, and where it is."""

    file: PlainName
    key: Annotated[str, Field(max_length=1024)]
    offset: Sizes
    shape: Sizes


@with_config(_FORBID)
class Entry(TypedDict):
    """A logical tensor: its shape, and the rectangles of each of its states."""

    shape: Sizes
    states: dict[str, list[Rectangle]]


def _inside(entry: Entry) -> Entry:
    """ValueError for a box that is not inside of its tensor, or a tensor that is larger than any."""
    shape = entry["shape"]
    if math.prod(shape) >= 2**48:
        raise ValueError(f"a tensor of shape {shape} is larger than any")
    for rectangles in entry["states"].values():
        for box in rectangles:
            pairs = zip(box["offset"], box["shape"], shape, strict=False)
            if not len(box["offset"]) == len(box["shape"]) == len(shape) or any(o + n > m for o, n, m in pairs):
                raise ValueError(f"a box of shape {box['shape']} at {box['offset']} is not inside of {shape}")
    return entry


class State(TypedDict):
    """`TrainState`."""

    step: Count
    samples: Count
    tokens: Count
    skipped: NotRequired[Count]
    loss_mean: NotRequired[Finite]
    replaced: NotRequired[Count]
    good: NotRequired[Annotated[int, Field(ge=-1, lt=2**62)]]
    rewinds: NotRequired[Count]
    damaged: NotRequired[list[Sha256]]


class Meta(TypedDict):
    """meta.json. The configuration is validated as such, and the noise table where it is loaded."""

    format: int
    step: Count
    state: State
    updates: Count
    identity: dict[str, Any]
    layout: Annotated[str, Field(max_length=1000)]
    config: dict[str, Any]
    noise_table: NotRequired[dict[str, Any]]


class Format(TypedDict):
    """What every version has said of itself."""

    format: int


@with_config(_FORBID)
class Hash(TypedDict):
    sha256: Sha256
    bytes: Size


INDEX: TypeAdapter[dict[str, Entry]] = TypeAdapter(dict[str, Annotated[Entry, AfterValidator(_inside)]])
META: TypeAdapter[Meta] = TypeAdapter(with_config(_FINITE)(Meta))
FORMAT_ALONE: TypeAdapter[Format] = TypeAdapter(Format)
HASHES: TypeAdapter[dict[str, Hash]] = TypeAdapter(dict[PlainName, Hash])

Name = Literal["index.json", "meta.json", "hashes.json"]


def read(folder: Path, name: Name, schema: TypeAdapter[Any]) -> Any:
    """A file of a checkpoint; UserError, in one line, if it is not what it has to be."""
    return load(folder / name, schema, f"checkpoint file {folder / name}", _LIMITS[name], _ADVICE)


def check(data: bytes, where: str, name: Name, schema: TypeAdapter[Any]) -> Any:
    """The same of bytes that were fetched from `where`."""
    return parse(data, schema, f"{where}/{name}", _LIMITS[name], _ADVICE)
