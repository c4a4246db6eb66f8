"""Text files into a finished data folder: inputs -> tokenizer -> token arrays -> shards -> manifest."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbit_data.inputs import InputFile, expand_inputs
from mbit_data.progress import Reporter
from mbit_data.read import Document, read_documents, scan
from mbit_data.tokenize import tokenize_documents
from mbit_data.tokenizer import Tokenizer
from mbit_data.train_tokenizer import (
    MAX_VOCAB_SIZE,
    MIN_VOCAB_SIZE,
    MODEL_TYPES,
    ModelType,
    sample_texts,
    train_tokenizer,
)
from mbit_data.write import SplitWriter
from megatron_bit import __version__
from megatron_bit.data.manifest import FILE_NAME, SPLITS, VERSION, Manifest, Split, load_manifest
from megatron_bit.errors import UserError
from megatron_bit.files import PARTIAL, write_atomic

TOKENIZER_FILE = "tokenizer.model"
UNFINISHED_FILE = "unfinished.json"  # marks a folder as ours until its manifest is written
DEFAULT_VOCAB_SIZE = 4096
DEFAULT_MODEL_TYPE: ModelType = "bpe"
DEFAULT_SAMPLE_BYTES = 8_000_000


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare. `None` for a tokenizer option means its default, and is the only value allowed
    together with `tokenizer` (but for a `vocab_size` equal to that tokenizer's)."""

    inputs: tuple[str, ...]  # files, folders, globs, or `stdlib`
    out: Path
    tokenizer: Path | None = None  # an existing SentencePiece .model, instead of training one
    vocab_size: int | None = None  # 4096
    model_type: ModelType | None = None  # bpe
    tokenizer_sample_bytes: int | None = None  # 8,000,000 bytes of text to train the tokenizer on
    validation_fraction: float = 0.02  # of the documents, chosen by their hash
    shard_tokens: int = 2_000_000
    workers: int = len(os.sched_getaffinity(0))  # processes; the CPUs this job may use


def prepare(options: PrepareOptions, progress: bool = True) -> Manifest:
    """Make the data folder `options.out`, or find it finished from the same options and inputs.

    The bytes written depend on the inputs and options alone, not on `workers`. Raises UserError for what
    the user can fix: options, inputs, a folder in use, a full disk.
    """
    _check(options)
    report = Reporter(progress)
    out = Path(options.out)
    files = expand_inputs(options.inputs, exclude=out)
    files, skipped, input_hash = scan(files, options.workers)
    if skipped:
        report.line(f"skipped {len(skipped)} files that are not text (first: {skipped[0].path})")
    identity = _identity(options, input_hash)
    if (out / FILE_NAME).exists():
        return _finished(out, identity, report)
    try:
        _claim(out, identity)
        manifest = _write(options, out, files, identity, report)
    except OSError as error:  # inputs that cannot be read are UserErrors already
        hint = "free disk space" if error.errno == errno.ENOSPC else "make it writable"
        raise UserError(f"cannot write to {out}: {error.strerror or error}; {hint} or choose another folder") from error
    return manifest


def _check(options: PrepareOptions) -> None:
    size = options.vocab_size
    if size is not None and options.tokenizer is None and not MIN_VOCAB_SIZE <= size <= MAX_VOCAB_SIZE:
        raise UserError(f"vocab_size is {size}; allowed are {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}")
    if options.model_type is not None and options.model_type not in MODEL_TYPES:
        raise UserError(f"model_type is {options.model_type!r}; allowed are {', '.join(MODEL_TYPES)}")
    if not 0 <= options.validation_fraction < 1:
        raise UserError(f"validation_fraction is {options.validation_fraction}; it must be in 0 <= x < 1")
    sample_bytes = options.tokenizer_sample_bytes
    for name, value in (
        ("shard_tokens", options.shard_tokens),
        ("workers", options.workers),
        ("tokenizer_sample_bytes", 1 if sample_bytes is None else sample_bytes),
    ):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if options.tokenizer is not None:
        for name in ("model_type", "tokenizer_sample_bytes"):
            if getattr(options, name) is not None:
                raise UserError(f"{name} is for training a tokenizer; leave it out when giving one")


def _identity(options: PrepareOptions, input_hash: str) -> dict[str, Any]:
    """All that decides the bytes of the folder, as JSON; paths and worker count do not."""
    if options.tokenizer is not None:
        given = Tokenizer(options.tokenizer)
        if options.vocab_size not in (None, given.vocab_size):
            raise UserError(
                f"vocab_size is {options.vocab_size}, but tokenizer {options.tokenizer} has "
                f"{given.vocab_size} pieces; leave vocab_size out"
            )
        tokenizer = {"given": given.sha256}
    else:
        tokenizer = {
            "vocab_size": options.vocab_size or DEFAULT_VOCAB_SIZE,
            "model_type": options.model_type or DEFAULT_MODEL_TYPE,
            "tokenizer_sample_bytes": options.tokenizer_sample_bytes or DEFAULT_SAMPLE_BYTES,
        }
    return {
        "format_version": VERSION,
        "input_sha256": input_hash,
        "tokenizer": tokenizer,
        "validation_fraction": options.validation_fraction,
        "shard_tokens": options.shard_tokens,
    }


def _finished(out: Path, identity: dict[str, Any], report: Reporter) -> Manifest:
    manifest = load_manifest(out)
    there = manifest.identity
    differing = [
        f"{name} ({there.get(name)} there, {value} here)"
        for name, value in identity.items()
        if there.get(name) != value
    ]
    if differing:
        raise UserError(f"{out} holds other data: {'; '.join(differing)}; choose another folder or remove it")
    report.line(f"{out}: nothing to do, already prepared from the same inputs and options")
    return manifest


def _claim(out: Path, identity: dict[str, Any]) -> None:
    """Make the folder ours: an empty or new one, or one that an interrupted `prepare` left behind."""
    out.mkdir(parents=True, exist_ok=True)
    marker = out / UNFINISHED_FILE
    if marker.exists():
        for path in out.iterdir():
            shard = path.name.startswith(tuple(f"{split}-" for split in SPLITS)) and path.suffix == ".tar"
            if shard or path.name == TOKENIZER_FILE or path.suffix == PARTIAL:
                path.unlink()
    elif any(out.iterdir()):
        raise UserError(f"{out} is not empty and not a data folder; choose another folder")
    write_atomic(marker, json.dumps(identity, indent=2).encode())


def _write(
    options: PrepareOptions, out: Path, files: list[InputFile], identity: dict[str, Any], report: Reporter
) -> Manifest:
    total_bytes = sum(file.size for file in files)
    report.line(f"{len(files)} files, {total_bytes / 1e6:.1f} MB")
    tokenizer = _make_tokenizer(options, out, files, report)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    begin = time.monotonic()
    splits = _write_shards(options, out, files, tokenizer, dtype, report)
    seconds = time.monotonic() - begin
    _summarise(splits, seconds, options.workers, report)
    manifest = Manifest(
        folder=out,
        splits=splits,
        tokenizer_file=TOKENIZER_FILE,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        dtype=dtype,
        identity=identity,
        package_version=__version__,
    )
    write_atomic(out / FILE_NAME, manifest.to_json().encode())
    (out / UNFINISHED_FILE).unlink()
    report.line(f"wrote {out / FILE_NAME}")
    return manifest


def _make_tokenizer(options: PrepareOptions, out: Path, files: list[InputFile], report: Reporter) -> Tokenizer:
    begin = time.monotonic()
    if options.tokenizer is not None:
        model, verb = Path(options.tokenizer).read_bytes(), "copied"
    else:
        texts = sample_texts(files, options.tokenizer_sample_bytes or DEFAULT_SAMPLE_BYTES)
        model_type = options.model_type or DEFAULT_MODEL_TYPE
        model, verb = train_tokenizer(texts, options.vocab_size or DEFAULT_VOCAB_SIZE, model_type), "trained"
    write_atomic(out / TOKENIZER_FILE, model)
    tokenizer = Tokenizer(out / TOKENIZER_FILE)
    seconds = time.monotonic() - begin
    report.line(f"tokenizer: {tokenizer.vocab_size} pieces, {verb} in {seconds:.1f} s")
    if not tokenizer.exact:
        report.line(f"note: tokenizer {options.tokenizer} does not give every text back exactly")
    return tokenizer


def _write_shards(
    options: PrepareOptions,
    out: Path,
    files: list[InputFile],
    tokenizer: Tokenizer,
    dtype: str,
    report: Reporter,
) -> dict[str, Split]:
    writers = {split: SplitWriter(out, split, options.shard_tokens) for split in SPLITS}
    documents = tokenize_documents(_documents(files), tokenizer, dtype, options.workers)
    try:
        with report.bar("tokenizing", sum(file.size for file in files)) as advance:
            for number, document in enumerate(documents):
                split = _split_of(document.text_hash, options.validation_fraction)
                writers[split].add(f"{number:09d}", document)
                advance(document.read_bytes, len(document.tokens))
        return {split: writer.finish() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()


def _documents(files: list[InputFile]) -> Iterator[Document]:
    found = False
    for file in files:
        for document in read_documents(file):
            if document.text.strip():
                found = True
                yield document
    if not found:
        raise UserError(f"the input is empty: {len(files)} files without any text (first: {files[0].path})")


def _split_of(text_hash: bytes, validation_fraction: float) -> str:
    """By content, so that a document goes to the same split wherever it lies, and its copies with it."""
    position = int.from_bytes(text_hash[:8], "big") / 2**64
    return "validation" if position < validation_fraction else "train"


def _summarise(splits: dict[str, Split], seconds: float, workers: int, report: Reporter) -> None:
    tokens = sum(split.tokens for split in splits.values())
    text_bytes = sum(split.text_bytes for split in splits.values())
    report.line(
        f"tokenized {text_bytes / 1e6:.1f} MB of text into {tokens:,} tokens in {seconds:.1f} s "
        f"({text_bytes / 1e6 / seconds:.1f} MB/s, {workers} workers, {text_bytes / tokens:.2f} bytes a token)"
    )
    for name, split in splits.items():
        report.line(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {len(split.shards)} shards")
        if not split.tokens:
            report.line(f"note: the {name} split is empty: no document's hash chose it")
