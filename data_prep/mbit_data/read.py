"""Files into documents: by format, decoded, large .txt files split; and a hash over all that will be read."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Literal

from mbit_data.decompress import format_suffix, open_input
from mbit_data.inputs import InputFile
from mbit_data.records import JSON_LINES, PARQUET, check_parquet, json_lines, parquet_rows
from megatron_bit.errors import UserError

SPLIT_ABOVE = 1 << 20  # characters: a longer .txt file is split at two blank lines in a row
BINARY_PROBE = 8192  # bytes: a NUL among the first ones means "not text"

OnError = Literal["stop", "skip"]
ON_ERROR = ("stop", "skip")


@dataclass(frozen=True)
class Document:
    """One document. `read_bytes`: bytes on disk read for it, for the progress bar."""

    source: str
    index: int  # in its file: number of the document, or of the line (JSON lines), or of the row (Parquet)
    text: str
    read_bytes: int


@dataclass
class Reading:
    """How records are read, and what was found damaged on the way."""

    text_key: str = "text"
    on_error: OnError = "stop"
    damaged: int = 0
    first_damaged: str = field(default="", init=False)

    def report(self, file: InputFile, where: str, what: str) -> None:
        """Raises UserError, or counts, as `on_error` says."""
        message = f"input file {file.path}, {where}: {what}"
        if self.on_error == "stop":
            raise UserError(f"{message}; fix it, or leave such records out with --on-error skip")
        self.first_damaged = self.first_damaged or message
        self.damaged += 1


def read_documents(file: InputFile, reading: Reading | None = None) -> Iterator[Document]:
    """The documents of a file, line ends kept as they are.

    A .jsonl or .parquet file has one in each line or row. Any other file is one document, except a .txt file of
    more than 1 Mi characters: there, two or more blank lines in a row end a document and are dropped. A record or
    document that cannot be had exactly (no JSON, no such key, null, bytes that are not UTF-8) goes to `reading`.
    Raises UserError for that, and for a file that cannot be read or decompressed.
    """
    reading = reading or Reading()
    for document, where in _by_format(file, reading):
        try:
            document.text.encode()
        except UnicodeEncodeError as error:
            reading.report(file, _place(where, document.text, error.start), _what(error))
        else:
            yield document


def _place(where: str | int, text: str, position: int) -> str:
    return where if isinstance(where, str) else f"line {where + text.count(chr(10), 0, position)}"


def _what(error: UnicodeEncodeError) -> str:
    code = ord(error.object[error.start])
    # what surrogateescape makes of a byte that is not UTF-8
    return f"byte 0x{code - 0xDC00:02X} is not UTF-8" if 0xDC80 <= code <= 0xDCFF else "half a surrogate pair"


def _by_format(file: InputFile, reading: Reading) -> Iterator[tuple[Document, str | int]]:
    """Each document with its place in the file: a name, or the number of its first line."""
    suffix = format_suffix(file.source)

    def damaged(where: str, what: str) -> None:
        reading.report(file, where, what)

    if suffix in PARQUET:
        done = 0
        for row, text, share in parquet_rows(file, reading.text_key, damaged):
            now = int(share * file.size)
            yield Document(file.source, row, text, now - done), f"row {row}"
            done = now
        return
    with open_input(file) as (stream, raw):
        done = 0
        if suffix in JSON_LINES:
            for index, text in json_lines(stream, reading.text_key, damaged):
                position = raw.tell()
                yield Document(file.source, index, text, position - done), f"line {index + 1}"
                done = position
            return
        text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
        if suffix != ".txt":
            yield Document(file.source, 0, text.read(), file.size), 1
            return
        head = text.read(SPLIT_ABOVE + 1)
        if len(head) <= SPLIT_ABOVE:
            yield Document(file.source, 0, head, file.size), 1
            return
        for index, (part, line) in enumerate(_split_at_blank_lines(_lines(head, text))):
            position = raw.tell()
            yield Document(file.source, index, part, position - done), line
            done = position


def _lines(head: str, rest: IO[str]) -> Iterator[str]:
    """Lines of a text whose beginning has been read already."""
    if head.endswith("\r"):
        head += rest.read(1)  # it may be half a line end
    lines = io.StringIO(head, newline="")
    for line in lines:
        if not line.endswith(("\n", "\r")):
            line += rest.readline()
        yield line
    yield from rest


def _split_at_blank_lines(lines: Iterator[str]) -> Iterator[tuple[str, int]]:
    """(document, number of its first line)."""
    document: list[str] = []
    blank: list[str] = []
    first = 1
    for number, line in enumerate(lines, 1):
        if not line.strip("\r\n"):
            blank.append(line)
            continue
        if len(blank) >= 2 and document:
            yield "".join(document), first
            document = []
        elif document:
            document += blank
        blank = []
        first = first if document else number
        document.append(line)
    if document:
        yield "".join(document + (blank if len(blank) < 2 else [])), first


def scan(
    files: list[InputFile], threads: int, reading: Reading | None = None
) -> tuple[list[InputFile], list[InputFile], list[str]]:
    """(files to read, skipped files, SHA-256 of each file to read).

    A binary file is skipped where a folder or glob brought it in.
    Raises UserError if the user named it, and for a Parquet file without the text column.
    """
    text_key = (reading or Reading()).text_key
    with ThreadPoolExecutor(max(1, threads)) as pool:  # hashing releases the interpreter lock
        hashes = list(pool.map(lambda file: _hash_if_readable(file, text_key), files))
    found = [(file, digest) for file, digest in zip(files, hashes, strict=True) if digest is not None]
    skipped = [file for file, digest in zip(files, hashes, strict=True) if digest is None]
    return [file for file, _ in found], skipped, [digest for _, digest in found]


def combine_hashes(files: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over the names and contents of files, given as (source, SHA-256), in order."""
    total = hashlib.sha256()
    for source, digest in files:
        total.update(f"{len(source)}:{source}:{digest}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def text_files(files: list[InputFile], threads: int) -> list[InputFile]:
    """The files that `scan` would read, by their first bytes alone."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        kept = list(pool.map(_is_text, files))
    return [file for file, text in zip(files, kept, strict=True) if text]


def _is_text(file: InputFile) -> bool:
    """Raises UserError for a binary file that the user named."""
    if format_suffix(file.source) in PARQUET:
        return True
    with open_input(file) as (stream, _):
        binary = b"\0" in stream.read(BINARY_PROBE)
    if binary and file.named:
        raise UserError(f"input file {file.path} is binary (NUL bytes in it); give text files")
    return not binary


def _hash_if_readable(file: InputFile, text_key: str) -> str | None:
    if format_suffix(file.source) in PARQUET:
        check_parquet(file, text_key)
    elif not _is_text(file):
        return None
    with open_input(file) as (_, raw):
        return hashlib.file_digest(raw, "sha256").hexdigest()
