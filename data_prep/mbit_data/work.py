"""The steps of a prepare, over all files or over one part of them: tokenizer, copies, shards."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mbit_data import dedup, pool, tokenize
from mbit_data.decompress import check_unchanged
from mbit_data.filters import BROKEN, EMPTY, EXACT_DUPLICATE, NEAR_DUPLICATE, add_counts
from mbit_data.input_file import InputFile
from mbit_data.journal import Journal
from mbit_data.options import DEFAULT_MODEL_TYPE, DEFAULT_SAMPLE_BYTES, DEFAULT_VOCAB_SIZE, PrepareOptions
from mbit_data.progress import Reporter
from mbit_data.read import Document, Reading, read_documents
from mbit_data.tokenize import TokenizedDocument
from mbit_data.train_tokenizer import sample_texts, train_tokenizer
from mbit_data.write import SplitWriter
from megatron_bit.data.hf_tokenizer import TOKENIZER_CONFIG, HuggingFaceModel, config_for
from megatron_bit.data.manifest import SPLITS, Split
from megatron_bit.data.tokenizer import FILE_NAMES, Tokenizer
from megatron_bit.io.files import write_atomic

UINT16_PIECES = 1 << 16
KEYS_FILE = "dedup.keys"  # of a single process


@dataclass(frozen=True)
class Work:
    """What the steps share. `files`: those to make shards of, which `prefix` names apart from other parts'."""

    options: PrepareOptions
    out: Path
    files: list[InputFile]
    journal: Journal
    report: Reporter

    @property
    def prefix(self) -> str:
        return self.options.part.prefix if self.options.part else ""

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)


def dtype_of(tokenizer: Tokenizer) -> str:
    """Of the token payload."""
    return "uint16" if tokenizer.vocab_size <= UINT16_PIECES else "uint32"


def make_tokenizer(work: Work, files: list[InputFile], may_reuse: bool) -> Tokenizer:
    """The tokenizer in the folder: copied, trained on `files`, or, with `may_reuse`, the one trained before.

    Raises UserError, OSError.
    """
    options, begin = work.options, time.monotonic()
    if options.tokenizer is not None:
        given = Tokenizer(options.tokenizer, options.eos_token)
        if isinstance(given.model, HuggingFaceModel):
            _place(work, TOKENIZER_CONFIG, config_for(given.model.eos_token))
        name, verb = FILE_NAMES[given.kind], "copied"
        _place(work, name, given.path.read_bytes())
    else:
        name, verb = FILE_NAMES["sentencepiece"], "trained"
        if may_reuse and (work.out / name).exists():
            verb = "trained before"
        else:
            texts = sample_texts(files, options.tokenizer_sample_bytes or DEFAULT_SAMPLE_BYTES, options.reading())
            kept = (text for text in texts if options.filters.reason(text) is None)
            size, model_type = options.vocab_size or DEFAULT_VOCAB_SIZE, options.model_type or DEFAULT_MODEL_TYPE
            _place(work, name, train_tokenizer(kept, size, model_type))
    tokenizer = Tokenizer(work.out / name)
    work.report.line(f"tokenizer: {tokenizer.vocab_size} pieces, {verb} in {time.monotonic() - begin:.1f} s")
    if not tokenizer.exact:
        work.report.line(f"note: tokenizer {options.tokenizer} does not give every text back exactly")
    return tokenizer


def _place(work: Work, name: str, data: bytes) -> None:
    """Like write_atomic, also when other parts write the same file at the same time."""
    work.journal.check()
    own = work.out / f"{work.prefix}{name}"
    write_atomic(own, data)
    os.replace(own, work.out / name)


def keys_path(work: Work) -> Path:
    return work.out / (f"{work.options.part.name}.keys" if work.options.part else KEYS_FILE)


def write_keys(work: Work) -> None:
    """The first pass of duplicate removal, unless an earlier run has finished it. Raises UserError, OSError."""
    path, options = keys_path(work), work.options
    if path.exists() and work.journal.continued:
        work.report.line("duplicates: keys are there already")
        return
    assert options.dedup is not None
    begin, found = time.monotonic(), 0
    reading = options.reading()
    with work.report.bar("looking for duplicates", work.total_bytes) as advance:
        results = pool.map_documents(
            tokenize.keys, (options.filters, options.dedup), _numbered(work.files, reading, Counter()), options.workers
        )

        def records() -> Iterator[np.ndarray]:
            nonlocal found
            for _, document, record in results:
                advance(document.read_bytes, 0)
                found += 1
                yield record

        dedup.write_keys(path, records())
    work.report.line(f"keys of {found:,} documents in {time.monotonic() - begin:.1f} s")


def write_shards(
    work: Work, tokenizer: Tokenizer, copies: np.ndarray | None
) -> tuple[dict[str, Split], dict[str, int]]:
    """(the finished splits, documents and records left out by reason). Raises UserError, OSError.

    `copies`: bool for each document of the files, True to leave it out.
    """
    options, journal = work.options, work.journal
    how = tokenize.Encoding(
        tokenizer=str(tokenizer.path),
        tokenizer_sha256=tokenizer.sha256,
        dtype=dtype_of(tokenizer),
        validation_fraction=options.validation_fraction,
        filters=options.filters,
        done={split: done.last_document for split, done in journal.finished.items()},
    )
    writers = {
        split: SplitWriter(
            work.out, _shard_prefix(split, work), options.shard_tokens, journal.finished[split].shards, journal.check
        )
        for split in SPLITS
    }
    dropped: Counter[str] = Counter()
    reading = options.reading()
    numbered = _without(_numbered(work.files, reading, dropped), copies, options, dropped)
    begin, made = time.monotonic(), 0
    try:
        with work.report.bar("tokenizing", work.total_bytes) as advance:
            for number, document, encoded in pool.map_documents(tokenize.encode, how, numbered, options.workers):
                tokens = encoded.tokens
                if encoded.reason is not None:
                    dropped[encoded.reason] += 1
                elif tokens is not None:
                    made += encoded.text_bytes
                    whole = TokenizedDocument(
                        document.source,
                        document.index,
                        tokens,
                        encoded.text_bytes,
                        encoded.text_hash,
                        document.read_bytes,
                    )
                    shard = writers[encoded.split].add(f"{work.prefix}{number:09d}", whole)
                    if shard is not None:
                        if reading.unfinished is not None:  # after a kill nobody will hear of its hash
                            check_unchanged(reading.unfinished)
                        journal.add(encoded.split, shard, number)
                advance(document.read_bytes, 0 if tokens is None else len(tokens))
        splits = {split: writer.finish() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
    add_counts(dropped, {BROKEN: reading.damaged})
    _summarise(work, splits, made, time.monotonic() - begin, reading)
    return splits, dict(sorted(dropped.items()))


def _shard_prefix(split: str, work: Work) -> str:
    return f"{split}-{work.prefix}".removesuffix("-")


def _numbered(files: list[InputFile], reading: Reading, dropped: Counter[str]) -> Iterator[tuple[int, Document]]:
    """Every document that has any text, with its number."""
    number = 0
    for file in files:
        for document in read_documents(file, reading):
            if document.text.strip():
                yield number, document
                number += 1
            else:
                dropped[EMPTY] += 1


def _without(
    documents: Iterator[tuple[int, Document]], copies: np.ndarray | None, options: PrepareOptions, dropped: Counter[str]
) -> Iterator[tuple[int, Document]]:
    reason = EXACT_DUPLICATE if options.dedup == "exact" else NEAR_DUPLICATE
    for number, document in documents:
        if copies is not None and copies[number]:
            dropped[reason] += 1
        else:
            yield number, document


def _summarise(work: Work, splits: dict[str, Split], made: int, seconds: float, reading: Reading) -> None:
    report = work.report
    tokens = sum(split.tokens for split in splits.values())
    text_bytes = sum(split.text_bytes for split in splits.values())
    per_token = f", {text_bytes / tokens:.2f} bytes a token" if tokens else ""
    report.line(
        f"tokenized {made / 1e6:.1f} MB of text into {tokens:,} tokens in {seconds:.1f} s "
        f"({made / 1e6 / max(seconds, 1e-9):.1f} MB/s, {work.options.workers} workers{per_token})"
    )
    summarise(report, splits, reading, whole=work.options.part is None)


def summarise(report: Reporter, splits: Mapping[str, Split], reading: Reading, whole: bool) -> None:
    """What the splits have got; `whole`: they are not those of one task of an array."""
    for name, split in splits.items():
        report.line(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens, {len(split.shards)} shards")
        if not split.tokens and whole:
            report.line(f"note: the {name} split is empty: no document's hash chose it")
    if reading.damaged:
        report.line(f"note: {reading.damaged:,} damaged records left out (first: {reading.first_damaged})")


def describe_dropped(dropped: Mapping[str, int]) -> str:
    """For people: `12 empty, 3 min_chars`, or nothing."""
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
