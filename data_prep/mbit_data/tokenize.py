"""What a worker does with documents: leave out, choose the split, encode."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mbit_data.filters import Filters
from mbit_data.minhash import Dedup, exact_keys, near_keys
from megatron_bit.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenizedDocument:
    """A document as it goes into a shard; `tokens` ends with the end-of-document id."""

    source: str
    index: int
    tokens: np.ndarray  # uint16 or uint32 [n]
    text_bytes: int
    text_hash: bytes  # SHA-256 of the UTF-8 text
    read_bytes: int


@dataclass(frozen=True)
class Encoding:
    """How documents are encoded, as it is sent to the workers."""

    tokenizer: str  # path
    tokenizer_sha256: str
    dtype: str
    validation_fraction: float
    filters: Filters
    done: Mapping[str, int]  # for each split, the last document that is in a finished shard


class Encoded(NamedTuple):
    """`reason`: why it is left out. `tokens`: None if it is, or if a finished shard has it."""

    reason: str | None
    split: str = ""
    tokens: np.ndarray | None = None
    text_bytes: int = 0
    text_hash: bytes = b""


def split_of(text_hash: bytes, validation_fraction: float) -> str:
    """By content, so that a document goes to the same split wherever it lies, and its copies with it."""
    position = int.from_bytes(text_hash[:8], "big") / 2**64
    return "validation" if position < validation_fraction else "train"


def encode(texts: list[tuple[int, str]], how: Encoding) -> list[Encoded]:
    """The documents (number, text) of one task."""
    tokenizer = _load(how.tokenizer, how.tokenizer_sha256)
    results = []
    for number, text in texts:
        reason = how.filters.reason(text)
        if reason is not None:
            results.append(Encoded(reason))
            continue
        data = text.encode()
        text_hash = hashlib.sha256(data).digest()
        split = split_of(text_hash, how.validation_fraction)
        tokens = None
        if number > how.done[split]:
            tokens = np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype=how.dtype)
        results.append(Encoded(None, split, tokens, len(data), text_hash))
    return results


def keys(texts: list[tuple[int, str]], how: tuple[Filters, Dedup]) -> list[np.ndarray]:
    """The records of `mbit_data.dedup` for the documents of one task."""
    filters, dedup = how
    of_text = exact_keys if dedup == "exact" else near_keys
    results = []
    for _, text in texts:
        hash_words = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype=">u8").astype("<u8")
        record = np.concatenate([hash_words, of_text(text)])
        results.append(np.zeros_like(record) if filters.reason(text) is not None else record)
    return results


@lru_cache(maxsize=1)
def _load(path: str, sha256: str) -> Tokenizer:
    """Once a process. The hash is there so that another tokenizer under the same path is another entry."""
    return Tokenizer(path)
