"""What to prepare: the options, what is allowed, and which of them decide the bytes that are written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbit_data.decompress import format_suffix
from mbit_data.filters import Filters
from mbit_data.input_file import InputFile
from mbit_data.left_out import ON_ERROR, OnError
from mbit_data.minhash import DEDUP, Dedup
from mbit_data.read import DEFAULT_TEXT_KEY, Reading
from mbit_data.records import RECORDS
from mbit_data.train_tokenizer import MAX_VOCAB_SIZE, MIN_VOCAB_SIZE, MODEL_TYPES, ModelType
from megatron_bit.data.manifest import VERSION
from megatron_bit.data.tokenizer import Tokenizer
from megatron_bit.errors import UserError

DEFAULT_VOCAB_SIZE = 4096
DEFAULT_MODEL_TYPE: ModelType = "bpe"
DEFAULT_SAMPLE_BYTES = 8_000_000
MAX_PARTS = 10_000
NO_FILTERS = Filters()


@dataclass(frozen=True)
class Part:
    """One task of an array: number `index` of `count`, from 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"part {self.index} of {self.count}"

    @property
    def prefix(self) -> str:
        """Of the part's shards and document keys."""
        return f"{self.index:04d}-"

    @property
    def name(self) -> str:
        return f"part-{self.index:04d}-of-{self.count:04d}"


@dataclass(frozen=True)
class PrepareOptions:
    """`None` for a tokenizer option means its default, and is the only value allowed together with `tokenizer`
    (but for a `vocab_size` equal to that tokenizer's)."""

    inputs: tuple[str, ...]  # files, folders, globs, or `stdlib`
    out: Path
    tokenizer: Path | None = None  # an existing SentencePiece .model or tokenizer.json, instead of training one
    vocab_size: int | None = None  # 4096
    model_type: ModelType | None = None  # bpe
    tokenizer_sample_bytes: int | None = None  # 8,000,000 bytes of text to train the tokenizer on
    validation_fraction: float = 0.02  # of the documents, chosen by their hash
    shard_tokens: int = 2_000_000
    workers: int = len(os.sched_getaffinity(0))  # processes; the CPUs this job may use
    eos_token: str | None = None  # ends a document, where a tokenizer.json does not say it
    text_key: str | None = None  # of JSON lines, and the column of Parquet; text
    on_error: OnError = "stop"  # at a damaged record, or leave it out and count it
    filters: Filters = NO_FILTERS
    dedup: Dedup | None = None
    part: Part | None = None  # only this share of the inputs

    def reading(self) -> Reading:
        return Reading(self.text_key, self.on_error)

    def check(self) -> None:
        """Raises UserError for a value that is not allowed, or two that contradict each other."""
        size = self.vocab_size
        if size is not None and self.tokenizer is None and not MIN_VOCAB_SIZE <= size <= MAX_VOCAB_SIZE:
            raise UserError(f"vocab_size is {size}; allowed are {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}")
        for name, allowed in (("model_type", MODEL_TYPES), ("on_error", ON_ERROR), ("dedup", DEDUP)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise UserError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction is {self.validation_fraction}; it must be in 0 <= x < 1")
        sample_bytes = self.tokenizer_sample_bytes
        for name, value in (
            ("shard_tokens", self.shard_tokens),
            ("workers", self.workers),
            ("tokenizer_sample_bytes", 1 if sample_bytes is None else sample_bytes),
        ):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.tokenizer is not None:
            for name in ("model_type", "tokenizer_sample_bytes"):
                if getattr(self, name) is not None:
                    raise UserError(f"{name} is for training a tokenizer; leave it out when giving one")
        elif self.eos_token is not None:
            raise UserError(f"eos_token is {self.eos_token!r}; it is for a tokenizer.json given with --tokenizer")
        self.filters.check()
        part = self.part
        if part is not None and not (1 <= part.count <= MAX_PARTS and 0 <= part.index < part.count):
            raise UserError(
                f"array index {part.index} of {part.count} tasks: allowed are counts of 1 to {MAX_PARTS} and indices "
                "from 0 to the count minus 1"
            )

    def check_use(self, files: Iterable[InputFile]) -> None:
        """Raises UserError for an option that none of the files has a use for."""
        if self.text_key is not None and not any(format_suffix(file.source) in RECORDS for file in files):
            raise UserError(
                f"text_key is {self.text_key!r}, and no input has records: it is for {', '.join(RECORDS)}; leave it out"
            )

    def identity(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """All that decides the bytes of the folder, as JSON; paths and worker count do not.

        An option that is off is left out, so that what it could do later does not change what was made without it.
        `on_error` is none of them: what "stop" has finished had nothing damaged in it, so "skip" may go on with it.
        """
        if self.tokenizer is not None:
            given = Tokenizer(self.tokenizer, self.eos_token)
            if self.vocab_size not in (None, given.vocab_size):
                raise UserError(
                    f"vocab_size is {self.vocab_size}, but tokenizer {self.tokenizer} has "
                    f"{given.vocab_size} pieces; leave vocab_size out"
                )
            tokenizer: dict[str, Any] = {"given": given.sha256}
            if given.kind == "huggingface":
                tokenizer["eos_id"] = given.eos_id
        else:
            tokenizer = {
                "vocab_size": self.vocab_size or DEFAULT_VOCAB_SIZE,
                "model_type": self.model_type or DEFAULT_MODEL_TYPE,
                "tokenizer_sample_bytes": self.tokenizer_sample_bytes or DEFAULT_SAMPLE_BYTES,
            }
        optional = {
            "text_key": None if self.text_key == DEFAULT_TEXT_KEY else self.text_key,
            "filters": self.filters.given() or None,
            "dedup": self.dedup,
            "parts": self.part.count if self.part else None,
        }
        return {
            "format_version": VERSION,
            **inputs,
            "tokenizer": tokenizer,
            "validation_fraction": self.validation_fraction,
            "shard_tokens": self.shard_tokens,
            **{name: value for name, value in optional.items() if value is not None},
        }


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What two identities differ in, for people; empty if nothing."""
    names = [*here, *(name for name in there if name not in here)]
    return "; ".join(
        f"{name} ({there.get(name)} there, {here.get(name)} here)"
        for name in names
        if there.get(name) != here.get(name)
    )


def code_sha256() -> str:
    """SHA-256 (hex) over the source files that make ids of text and the versions of the tokenizer libraries."""
    from importlib.metadata import PackageNotFoundError, version

    from megatron_bit.data import hf_tokenizer, tokenizer

    total = hashlib.sha256()
    for path in (*sorted(Path(__file__).parent.glob("*.py")), Path(tokenizer.__file__), Path(hf_tokenizer.__file__)):
        total.update(f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    for package in ("sentencepiece", "tokenizers"):
        try:
            total.update(f"{package}:{version(package)}\n".encode())
        except PackageNotFoundError:
            continue
    return total.hexdigest()
