"""Raw binary records into a data folder: every record of B bits is a token, without a tokenizer or a vocabulary."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbit_data.decompress import check_unchanged, open_input
from mbit_data.filters import BROKEN, EMPTY
from mbit_data.input_file import InputFile
from mbit_data.inputs import expand_inputs
from mbit_data.journal import Journal
from mbit_data.left_out import ON_ERROR, LeftOut, OnError
from mbit_data.options import code_sha256
from mbit_data.prepare import make_folder
from mbit_data.progress import Reporter
from mbit_data.read import Reading, combine_hashes, hash_file
from mbit_data.tokenize import TokenizedDocument, split_of
from mbit_data.work import summarise
from mbit_data.write import SplitWriter
from megatron_bit import __version__
from megatron_bit.data.manifest import FILE_NAME, SPLITS, VERSION, Manifest, Split
from megatron_bit.data.manifest_schema import MAX_RAW_BITS
from megatron_bit.errors import UserError
from megatron_bit.io.files import write_atomic

DEFAULT_DOCUMENT_RECORDS = 65_536


@dataclass(frozen=True)
class RawOptions:
    inputs: tuple[str, ...]  # files, folders, globs
    out: Path
    bits: int  # of a record; a file is a sequence of records of ceil(bits / 8) bytes, the highest bit of a byte first
    document_records: int = DEFAULT_DOCUMENT_RECORDS  # a longer file is cut into documents of so many
    validation_fraction: float = 0.02  # of the documents, chosen by their hash
    shard_tokens: int = 2_000_000
    on_error: OnError = "stop"  # at a file that is no whole number of records, or leave the broken documents out

    def check(self) -> None:
        """Raises UserError for a value that is not allowed."""
        if not 1 <= self.bits <= MAX_RAW_BITS:
            raise UserError(f"raw_bits is {self.bits}; allowed are 1 to {MAX_RAW_BITS}")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction is {self.validation_fraction}; it must be in 0 <= x < 1")
        for name in ("document_records", "shard_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.on_error not in ON_ERROR:
            raise UserError(f"on_error is {self.on_error!r}; allowed are {', '.join(ON_ERROR)}")

    @property
    def record_bytes(self) -> int:
        return -(-self.bits // 8)

    def identity(self, content: str) -> dict[str, Any]:
        """All that decides the bytes of the folder, as JSON."""
        return {
            "format_version": VERSION,
            "input_sha256": content,
            "raw_bits": self.bits,
            "document_records": self.document_records,
            "validation_fraction": self.validation_fraction,
            "shard_tokens": self.shard_tokens,
        }


def prepare_raw(options: RawOptions, progress: bool = True) -> Manifest:
    """Make the data folder `options.out`, go on with it, or find it finished from the same options and inputs.

    One process: the work is copying. Raises UserError as `prepare` does.
    """
    options.check()
    report, out = Reporter(progress), Path(options.out)
    left_out = LeftOut(options.on_error)
    found = expand_inputs(options.inputs, out, left_out, spool=out)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        files = [file for file in pool.map(lambda file: hash_file(file, left_out), found) if file is not None]
    for line in left_out.lines():
        report.line(line)
    if not files:
        raise UserError(f"none of the {len(found)} input files can be read (first: {found[0].name})")
    content = combine_hashes((file.source, file.sha256) for file in files)
    identity = options.identity(content)

    def make(journal: Journal) -> Manifest:
        report.line(f"{len(files)} files, {sum(file.size for file in files) / 1e6:.1f} MB")
        splits, dropped = _write_shards(options, out, files, journal, report)
        if not any(split.documents for split in splits.values()):
            raise UserError(f"the input is empty: no record in {len(files)} files (first: {files[0].name})")
        dropped |= left_out.counts
        manifest = Manifest(
            folder=out, splits=splits, tokenizer_file="", tokenizer_sha256="", vocab_size=0, eos_id=0, dtype="uint8",
            identity=identity, package_version=__version__, dropped=dropped, raw_bits=options.bits,
            code_sha256=code_sha256(),
        )  # fmt: skip
        write_atomic(out / FILE_NAME, manifest.to_json().encode())
        return manifest

    return make_folder(out, identity, report, make)


def _write_shards(
    options: RawOptions, out: Path, files: list[InputFile], journal: Journal, report: Reporter
) -> tuple[dict[str, Split], dict[str, int]]:
    writers = {split: SplitWriter(out, split, options.shard_tokens, journal.finished[split].shards) for split in SPLITS}
    dropped: Counter[str] = Counter()
    reading = Reading(on_error=options.on_error)
    begin, made = time.monotonic(), 0
    try:
        with report.bar("reading records", sum(file.size for file in files)) as advance:
            for number, document in enumerate(_documents(options, files, reading, dropped)):
                split = split_of(document.text_hash, options.validation_fraction)
                if number > journal.finished[split].last_document:
                    made += document.text_bytes
                    shard = writers[split].add(f"{number:09d}", document)
                    if shard is not None:
                        if reading.unfinished is not None:
                            check_unchanged(reading.unfinished)
                        journal.add(split, shard, number)
                advance(document.read_bytes, len(document.tokens))
        splits = {split: writer.finish() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
    if reading.damaged:
        dropped[BROKEN] = reading.damaged
    seconds, records = time.monotonic() - begin, sum(split.tokens for split in splits.values())
    rate = made / 1e6 / max(seconds, 1e-9)
    report.line(f"{made / 1e6:.1f} MB, {records:,} records in {seconds:.1f} s ({rate:.0f} MB/s)")
    summarise(report, splits, reading, whole=True)
    return splits, dict(sorted(dropped.items()))


def _documents(
    options: RawOptions, files: list[InputFile], reading: Reading, dropped: Counter[str]
) -> Iterator[TokenizedDocument]:
    """Every file, cut into documents of whole records; `tokens` are uint8 [n, record_bytes]."""
    size, unused = options.record_bytes, 8 * options.record_bytes - options.bits
    for file in files:
        done = index = 0
        reading.unfinished = file
        with open_input(file) as opened:
            while data := opened.stream.read(options.document_records * size):
                begin, position = index * options.document_records, opened.position
                whole, rest = divmod(len(data), size)
                records = np.frombuffer(data, dtype=np.uint8, count=whole * size).reshape(-1, size)
                wrong = np.flatnonzero(records[:, -1] & (2**unused - 1))
                if rest:
                    reading.report(
                        file, f"record {begin + whole}",
                        f"the file ends after {rest} of its {size} bytes (records of {options.bits} bits)",
                    )  # fmt: skip
                elif len(wrong):
                    reading.report(
                        file, f"record {begin + int(wrong[0])}",
                        f"the last {unused} bits of its {size} bytes have to be 0 (records of {options.bits} bits)",
                    )  # fmt: skip
                else:
                    digest = hashlib.sha256(data).digest()
                    yield TokenizedDocument(file.source, index, records, len(data), digest, position - done)
                    done = position
                index += 1
            opened.finish()
        reading.unfinished = None
        if index == 0:
            dropped[EMPTY] += 1
