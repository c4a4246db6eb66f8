"""What `manifest.json` may hold: every value is looked at before a file is opened by it or memory is taken for it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from megatron_bit.io.strict_json import MIB, AnyObject, Count, PlainName, Sha256, load

LIMIT = 512 * MIB  # bytes of a manifest: two million shards
MAX_RAW_BITS = 256
MAX_VOCABULARY = 2**24  # tables of the vocabulary's size are made of it
MAX_TOKENS = 2**53  # of a folder: what is added up or multiplied later stays within 64 bits
TAR_BLOCK = 512  # bytes in a tar for each document at least
_BYTES = {"uint8": 1, "uint16": 2, "uint32": 4}
_ADVICE = "copy it again, or prepare the data again"

Size = Annotated[int, Field(ge=0, lt=2**48)]
OrNone = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]  # a SHA-256, or there is none
Words = Annotated[str, Field(max_length=1000)]


@with_config(ConfigDict(extra="forbid"))
class ShardEntry(TypedDict):
    """`manifest.Shard`."""

    file: PlainName
    documents: Count
    tokens: Count
    text_bytes: Count
    size: Size
    sha256: Sha256
    lengths_sha256: NotRequired[OrNone]


class SplitEntry(TypedDict):
    """Its totals are for people."""

    documents: NotRequired[Count]
    tokens: NotRequired[Count]
    text_bytes: NotRequired[Count]
    shards: list[ShardEntry]


class TokenizerEntry(TypedDict):
    """Both empty for records."""

    file: Annotated[str, Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.\-]{0,254})?$")]
    sha256: OrNone


class Content(TypedDict):
    """All of it; what a newer `prepare` may say besides is let pass, as it always was."""

    format: str
    version: int
    package_version: Words
    code_sha256: NotRequired[OrNone]
    fingerprint: Words
    vocab_size: Annotated[int, Field(ge=0, le=MAX_VOCABULARY)]
    eos_id: Count
    dtype: Literal["uint8", "uint16", "uint32"]
    raw_bits: NotRequired[Annotated[int, Field(ge=0, le=MAX_RAW_BITS)]]
    tokenizer: TokenizerEntry
    identity: AnyObject
    dropped: NotRequired[dict[str, Count]]
    splits: Annotated[dict[Literal["train", "validation"], SplitEntry], Field(min_length=1)]


class Head(TypedDict):
    """What says of what kind and of which version the rest is."""

    format: NotRequired[Any]
    version: NotRequired[Any]


def _together(content: Content) -> Content:
    """ValueError for values that contradict each other."""
    raw_bits, dtype, vocab_size = content.get("raw_bits", 0), content["dtype"], content["vocab_size"]
    if raw_bits and dtype != "uint8":
        raise ValueError(f"records of {raw_bits} bits as {dtype}, allowed is uint8")
    if not raw_bits:
        if dtype == "uint8":
            raise ValueError("dtype 'uint8' of tokens, allowed are uint16, uint32")
        if not 1 <= vocab_size <= 2 ** (8 * _BYTES[dtype]):
            raise ValueError(f"a vocabulary of {vocab_size} as {dtype}")
        if content["eos_id"] >= vocab_size:
            raise ValueError(f"eos_id {content['eos_id']} is outside the vocabulary of {vocab_size}")
        if not content["tokenizer"]["file"] or not content["tokenizer"]["sha256"]:
            raise ValueError("tokens without a tokenizer")
    width = math.ceil(raw_bits / 8) or _BYTES[dtype]
    seen: set[str] = set()
    tokens = 0
    for split in content["splits"].values():
        for shard in split["shards"]:
            name = shard["file"]
            if name in seen:
                raise ValueError(f"shard {name} is listed twice")
            seen.add(name)
            if shard["tokens"] * width > shard["size"]:
                raise ValueError(f"shard {name} of {shard['size']} bytes cannot hold {shard['tokens']} tokens")
            if shard["documents"] > shard["tokens"] or shard["documents"] * TAR_BLOCK > shard["size"]:
                raise ValueError(
                    f"shard {name} of {shard['tokens']} tokens in {shard['size']} bytes cannot hold "
                    f"{shard['documents']} documents"
                )
            tokens += shard["tokens"]
    if tokens > MAX_TOKENS:
        raise ValueError(f"{tokens} tokens are more than any folder has")
    return content


HEAD: TypeAdapter[Head] = TypeAdapter(Head)
CONTENT: TypeAdapter[Content] = TypeAdapter(Annotated[Content, AfterValidator(_together)])


def read_head(path: Path, where: str) -> Head:
    """Kind and version; UserError, in one line, if it cannot be read or is no JSON object."""
    return load(path, HEAD, where, LIMIT, _ADVICE)


def read_content(path: Path, where: str) -> Content:
    """All of it; UserError, in one line, if a value is not what it has to be."""
    return load(path, CONTENT, where, LIMIT, _ADVICE)
