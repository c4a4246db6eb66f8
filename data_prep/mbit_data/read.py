"""Files into documents: by format, decoded, large .txt files split; and a hash over all that will be read."""

from __future__ import annotations

import codecs
import hashlib
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import IO

from mbit_data.decompress import Opened, UnreadableInput, format_suffix, open_input
from mbit_data.input_file import InputFile
from mbit_data.json_values import BrokenFile
from mbit_data.left_out import BINARY, ON_ERROR, UNREADABLE, UTF16, LeftOut, OnError
from mbit_data.records import JSON, JSON_LINES, PARQUET, check_parquet, json_file, json_lines, parquet_rows
from megatron_bit.errors import UserError

SPLIT_ABOVE = 1 << 20  # characters: a longer .txt file is split at two blank lines in a row
BINARY_PROBE = 8192  # bytes: a NUL among the first ones means "not text"
MAX_TEXT = 1 << 24  # UTF-8 bytes of a document: tokenizing takes a worker 60 bytes of memory for each
TOO_LONG = f"more than {MAX_TEXT >> 20} MiB in one document"
BOM = "\ufeff"
DEFAULT_TEXT_KEY = "text"
WIDE = (
    codecs.BOM_UTF16_LE,
    codecs.BOM_UTF16_BE,
    codecs.BOM_UTF32_BE,
)  # UTF-32's little-endian mark begins with UTF-16's

__all__ = ["ON_ERROR", "Document", "OnError", "Reading", "read_documents", "scan"]


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

    text_key: str | None = None  # None: "text"
    on_error: OnError = "stop"
    damaged: int = 0
    first_damaged: str = field(default="", init=False)
    unfinished: InputFile | None = field(default=None, init=False)  # the file whose hash is not yet known to be right

    @property
    def key(self) -> str:
        """Of JSON lines, and the column of Parquet."""
        return DEFAULT_TEXT_KEY if self.text_key is None else self.text_key

    def report(self, file: InputFile, where: str, what: str) -> None:
        """Raises UserError, or counts, as `on_error` says."""
        message = f"input file {file.name}, {where}: {what}"
        if self.on_error == "stop":
            raise UserError(f"{message}; fix it, or leave such records out with --on-error skip")
        self.first_damaged = self.first_damaged or message
        self.damaged += 1


def read_documents(file: InputFile, reading: Reading | None = None) -> Iterator[Document]:
    """The documents of a file, line ends kept as they are, without a byte order mark.

    A .jsonl or .parquet file has one in each line or row, a .json file in each line or element (`json_file`). Any other
    file is one document, except a .txt file of more than 1 Mi characters: there, two or more blank lines in a row end a
    document and are dropped. A record or document that cannot be had exactly (no JSON, no such key, null, bytes that
    are not UTF-8) or has more than MAX_TEXT bytes goes to `reading`.
    Raises UserError for that, for a file that cannot be read or decompressed, and, at its end at the latest, for one
    that has changed since it was listed and hashed.
    """
    reading = reading or Reading()
    reading.unfinished = file
    try:
        for document, where in _by_format(file, reading):
            try:
                size = len(document.text.encode())
            except UnicodeEncodeError as error:
                reading.report(file, _place(where, document.text, error.start), _what(error))
                continue
            if size > MAX_TEXT:
                reading.report(file, where if isinstance(where, str) else f"line {where}", TOO_LONG)
            else:
                yield document
    except BrokenFile as error:
        where, what = error.args
        raise UserError(f"input file {file.name}, {where}: {what}; fix it or leave it out") from error
    reading.unfinished = None


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

    with open_input(file) as opened:
        if suffix in PARQUET:
            done = 0
            for row, text, share in parquet_rows(file, opened.descriptor, reading.key, damaged):
                now = int(share * file.size)
                yield Document(file.source, row, text, now - done), f"row {row}"
                done = now
        elif suffix in (*JSON_LINES, JSON):
            done, records = 0, json_file if suffix == JSON else json_lines
            for index, text, place in records(opened.stream, reading.key, damaged):
                position = opened.position
                yield Document(file.source, index, text, position - done), place
                done = position
        else:
            yield from _texts(file, opened, suffix == ".txt", reading)
        opened.finish()


def _texts(file: InputFile, opened: Opened, split: bool, reading: Reading) -> Iterator[tuple[Document, int]]:
    """(document, number of its first line). Of a document that is too long no more is read than tells it."""
    text = io.TextIOWrapper(opened.stream, encoding="utf-8", errors="surrogateescape", newline="")
    head = text.read(1).removeprefix(BOM)
    head += text.read((SPLIT_ABOVE if split else MAX_TEXT) + 1 - len(head))
    if not split and len(head) > MAX_TEXT:
        reading.report(file, "line 1", f"{TOO_LONG}; as .txt it is cut at two blank lines, as .jsonl at lines")
    elif not split or len(head) <= SPLIT_ABOVE:
        yield Document(file.source, 0, head, file.size), 1
    else:
        done = 0
        for index, (part, line) in enumerate(_split_at_blank_lines(_lines(head, text))):
            position = opened.position
            if part is None:
                reading.report(file, f"line {line}", f"{TOO_LONG}: no two blank lines in a row")
                continue
            yield Document(file.source, index, part, position - done), line
            done = position
    opened.finish()  # before the text is closed, and the file with it


def _lines(head: str, rest: IO[str]) -> Iterator[str]:
    """Lines of a text whose beginning has been read already; a long one in several pieces."""
    if head.endswith("\r"):
        head += rest.read(1)  # it may be half a line end
    lines = io.StringIO(head, newline="")
    for line in lines:
        if not line.endswith(("\n", "\r")):
            line += rest.readline(SPLIT_ABOVE)
        yield line
    yield from iter(lambda: rest.readline(SPLIT_ABOVE), "")


def _split_at_blank_lines(pieces: Iterator[str]) -> Iterator[tuple[str | None, int]]:
    """(document, number of its first line) out of lines or pieces of them; None for one of more than MAX_TEXT."""
    document: list[str] = []
    blank: list[str] = []
    number, first, size, last = 0, 1, 0, "\n"
    for piece in pieces:
        # a piece may also end between the two characters of a line end
        goes_on = not last.endswith(("\n", "\r")) or (last.endswith("\r") and piece == "\n")
        last = piece
        if not goes_on:
            number += 1
            if not piece.strip("\r\n"):
                blank.append(piece)
                continue
            if len(blank) >= 2 and size:
                if size <= MAX_TEXT:
                    yield "".join(document), first
                document, size = [], 0
            elif size:
                document += blank
                size += sum(map(len, blank))
            blank = []
            first = first if size else number
        size += len(piece)
        document.append(piece)
        if size > MAX_TEXT:
            if size - len(piece) <= MAX_TEXT:
                yield None, first
            document.clear()
    if 0 < size <= MAX_TEXT:
        yield "".join(document + (blank if len(blank) < 2 else [])), first


def scan(
    files: list[InputFile], threads: int, reading: Reading | None = None, left_out: LeftOut | None = None
) -> list[InputFile]:
    """The files to read, with their SHA-256.

    What a folder or glob brought in and is no UTF-8 text (binary, or UTF-16, or may not be read: as `left_out` says)
    goes to `left_out`. Raises UserError for it if the user named it, and for a Parquet file without the text column.
    """
    reading, left_out = reading or Reading(), left_out or LeftOut()
    with ThreadPoolExecutor(max(1, threads)) as pool:  # hashing releases the interpreter lock
        hashed = list(pool.map(lambda file: _if_text(file, left_out, reading.key), files))
    return [file for file in hashed if file is not None]


def hash_file(file: InputFile, left_out: LeftOut) -> InputFile | None:
    """The file with its SHA-256, whatever is in it; None if `left_out` counts it. Raises UserError."""
    try:
        with open_input(file) as opened:
            return replace(file, sha256=opened.finish())
    except UnreadableInput as error:
        _leave_out(file, left_out, error)
        return None


def text_files(files: list[InputFile], threads: int, left_out: LeftOut | None = None) -> list[InputFile]:
    """The files that `scan` would read, by their first bytes alone."""
    left_out = left_out or LeftOut()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        kept = list(pool.map(lambda file: _is_text(file, left_out), files))
    return [file for file, text in zip(files, kept, strict=True) if text]


def _if_text(file: InputFile, left_out: LeftOut, text_key: str) -> InputFile | None:
    if not _is_text(file, left_out):
        return None
    if format_suffix(file.source) in PARQUET:
        check_parquet(file, text_key)
    return hash_file(file, left_out)


def _is_text(file: InputFile, left_out: LeftOut | None = None) -> bool:
    """Raises UserError for a file that is none and that the user named."""
    left_out = left_out or LeftOut()
    try:
        with open_input(file) as opened:
            head = b"" if format_suffix(file.source) in PARQUET else opened.stream.read(BINARY_PROBE)
    except UnreadableInput as error:
        _leave_out(file, left_out, error)
        return False
    wide = head.startswith(WIDE) and b"\0" in head
    if wide:
        problem = f"input file {file.name} is UTF-16 or UTF-32; make it UTF-8: iconv -f UTF-16 -t UTF-8 FILE > NEW"
        if file.named:
            raise UserError(problem)
        left_out.unless_stop(UTF16, file.name, problem)
    elif b"\0" in head:
        if file.named:
            raise UserError(f"input file {file.name} is binary (NUL bytes in it); give text files, in UTF-8")
        left_out.add(BINARY, file.name)
    return b"\0" not in head


def _leave_out(file: InputFile, left_out: LeftOut, error: UserError) -> None:
    if file.named or left_out.on_error == "stop":
        raise error
    left_out.add(UNREADABLE, file.name)


def combine_hashes(files: Iterable[tuple[str, str]]) -> str:
    """SHA-256 over the names and contents of files, given as (source, SHA-256), in order."""
    total = hashlib.sha256()
    for source, digest in files:
        total.update(f"{len(source)}:{source}:{digest}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()
