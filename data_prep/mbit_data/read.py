"""Files into documents: decompress, decode, split large .txt files, and hash what was read."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from typing import IO, cast

from mbit_data.inputs import InputFile
from megatron_bit.errors import UserError

SPLIT_ABOVE = 1 << 20  # characters: a longer .txt file is split at two blank lines in a row
BINARY_PROBE = 8192  # bytes: a NUL among the first ones means "not text"
NOT_YET = (".jsonl", ".parquet", ".zst")  # formats of their own, which must not be taken for plain text
DAMAGED = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True)
class Document:
    """One document. `read_bytes`: bytes on disk read for it, for the progress bar."""

    source: str
    index: int  # number of the document in its file
    text: str
    read_bytes: int


def text_suffix(source: str) -> str:
    """The suffix without that of the compression: `.txt` for `a.txt.xz`."""
    stem, suffix = os.path.splitext(source)
    return os.path.splitext(stem)[1] if suffix in (".gz", ".xz") else suffix


def read_documents(file: InputFile) -> Iterator[Document]:
    """The documents of a file, UTF-8 with replacement, line ends kept as they are.

    A file is one document, except a .txt file (also .txt.gz, .txt.xz) of more than 1 Mi characters: there,
    two or more blank lines in a row end a document and are dropped.
    Raises UserError for a file that cannot be read or decompressed.
    """
    with _open(file) as (stream, raw):
        text = io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="")
        if text_suffix(file.source) != ".txt":
            yield Document(file.source, 0, text.read(), file.size)
            return
        head = text.read(SPLIT_ABOVE + 1)
        if len(head) <= SPLIT_ABOVE:
            yield Document(file.source, 0, head, file.size)
            return
        text.seek(0)
        done = 0
        for index, part in enumerate(_split_at_blank_lines(text)):
            position = raw.tell()
            yield Document(file.source, index, part, position - done)
            done = position


def _split_at_blank_lines(lines: Iterator[str] | IO[str]) -> Iterator[str]:
    document: list[str] = []
    blank: list[str] = []
    for line in lines:
        if not line.strip("\r\n"):
            blank.append(line)
            continue
        if len(blank) >= 2 and document:
            yield "".join(document)
            document = []
        elif document:
            document += blank
        blank = []
        document.append(line)
    if document:
        yield "".join(document + (blank if len(blank) < 2 else []))


def scan(files: list[InputFile], threads: int) -> tuple[list[InputFile], list[InputFile], str]:
    """(text files, skipped files, SHA-256 over names and contents of the text files).

    A binary file, or one of a format not read yet, is skipped where a folder or glob brought it in.
    Raises UserError if the user named it, or if nothing is left.
    """
    with ThreadPoolExecutor(max(1, threads)) as pool:  # hashing releases the interpreter lock
        hashes = list(pool.map(_hash_text_file, files))
    kept = [file for file, digest in zip(files, hashes, strict=True) if digest is not None]
    skipped = [file for file, digest in zip(files, hashes, strict=True) if digest is None]
    if not kept:
        raise UserError(f"none of the {len(files)} input files is text (first: {files[0].path})")
    total = hashlib.sha256()
    for file, digest in zip(files, hashes, strict=True):
        if digest is not None:
            total.update(f"{len(file.source)}:{file.source}:{digest}\n".encode("utf-8", "surrogateescape"))
    return kept, skipped, total.hexdigest()


def _hash_text_file(file: InputFile) -> str | None:
    if any(suffix in NOT_YET for suffix in (os.path.splitext(file.source)[1], text_suffix(file.source))):
        if file.named:
            raise UserError(f"input file {file.path}: {', '.join(NOT_YET)} are not read yet; give it as text")
        return None
    with _open(file) as (stream, raw):
        if b"\0" in stream.read(BINARY_PROBE):
            if file.named:
                raise UserError(f"input file {file.path} is binary (NUL bytes in it); give text files")
            return None
        raw.seek(0)
        return hashlib.file_digest(raw, "sha256").hexdigest()


@contextmanager
def _open(file: InputFile) -> Iterator[tuple[IO[bytes], BufferedReader]]:
    """The decompressed bytes and the file on disk below it; errors of either become a UserError."""
    try:
        with open(file.path, "rb") as raw:
            decompress = {".gz": gzip.open, ".xz": lzma.open}.get(file.path.suffix)
            yield cast(IO[bytes], decompress(raw, "rb") if decompress else raw), raw
    except DAMAGED as error:
        raise UserError(f"input file {file.path} is damaged: {error}; copy it again") from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"input file {file.path} cannot be read: {reason}; fix it or leave it out") from error
