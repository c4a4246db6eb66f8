"""Open an input file and read what is inside it: plain, .gz, .xz or .zst, in pieces of bounded size.

The bytes on disk are hashed on their way, so that what was hashed once is known to be what is read now.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, cast

from mbit_data.input_file import InputFile
from megatron_bit.errors import UserError

COMPRESSED = (".gz", ".xz", ".zst")
READ_BYTES = 128 * 1024
MAX_WINDOW = 1 << 27  # bytes that a decompressor keeps: `zstd --long=27`, twice `xz -9`
XZ_MEMORY = MAX_WINDOW + (1 << 25)  # with all that xz has around its window
ZSTD_MAGIC, ZSTD_SKIPPED = b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
ZSTD_BLOCK_BYTES, ZSTD_BLOCKS, ZSTD_RLE = 128 * 1024, 8, 1
LIMIT = f"{MAX_WINDOW >> 20} MiB"


class ChangedInput(UserError):
    """The bytes of an input are others than at the first look."""


class UnreadableInput(UserError):
    """An input that cannot be opened."""


def format_suffix(source: str) -> str:
    """The suffix without that of the compression, in lower case: `.txt` for `a.TXT.xz`."""
    stem, suffix = os.path.splitext(source)
    return (os.path.splitext(stem)[1] if suffix.lower() in COMPRESSED else suffix).lower()


@dataclass(frozen=True)
class Opened:
    """`stream`: the decompressed bytes."""

    stream: IO[bytes]
    _file: InputFile
    _bytes: _FileBytes

    @property
    def descriptor(self) -> int:
        return self._bytes.file.fileno()

    @property
    def position(self) -> int:
        """Bytes read from disk."""
        return self._bytes.position

    def finish(self) -> str:
        """Read what is left on disk: the SHA-256 of the file. Raises ChangedInput if it is not what it was."""
        while self._bytes.read(1 << 20):
            pass
        digest = self._bytes.hash.hexdigest()
        if self._file.sha256 not in ("", digest):
            raise _changed(self._file)
        return digest


@contextmanager
def open_input(file: InputFile) -> Iterator[Opened]:
    """The file, open. What goes wrong with it, also later while reading, becomes a UserError naming it.

    Raises ChangedInput if it was written to since it was listed, UnreadableInput.
    """
    try:
        raw = open(file.path, "rb", buffering=0)  # noqa: SIM115
    except OSError as error:
        reason = error.strerror or error
        raise UnreadableInput(
            f"input file {file.name} cannot be read: {reason}; fix it or take it out of the input"
        ) from error
    try:
        with raw:
            _check(file, os.fstat(raw.fileno()))
            counted = _FileBytes(raw)
            yield Opened(_decompressed(file, io.BufferedReader(counted, READ_BYTES)), file, counted)
            _check(file, os.fstat(raw.fileno()))
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        if "Memory usage limit" in str(error):
            raise _window(file, "more") from error
        raise UserError(f"input file {file.name} is damaged: {error}; copy it again") from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"input file {file.name} cannot be read: {reason}; fix it or leave it out") from error


def check_unchanged(file: InputFile) -> None:
    """Raises ChangedInput if the file was written to, or is gone, since it was listed; by its size and time alone."""
    try:
        _check(file, os.stat(file.path))
    except OSError as error:
        raise _changed(file) from error


def _check(file: InputFile, status: os.stat_result) -> None:
    if (status.st_size, status.st_mtime_ns) != (file.size, file.written):
        raise _changed(file)


def _changed(file: InputFile) -> ChangedInput:
    return ChangedInput(
        f"input file {file.name} has changed while prepare was at work; leave the inputs alone until it has ended, and "
        "run it again"
    )


def _window(file: InputFile, window: str) -> UserError:
    return UserError(
        f"input file {file.name} needs {window} memory to be decompressed than the {LIMIT} of `zstd --long=27`; "
        "compress it again with a smaller window"
    )


class _FileBytes(io.RawIOBase):
    """The bytes on disk, once through, hashed."""

    def __init__(self, file: io.FileIO):
        self.file, self.hash, self.position = file, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.file.readinto(buffer) or 0
        self.hash.update(memoryview(buffer)[:count])
        self.position += count
        return count


def _decompressed(file: InputFile, raw: io.BufferedReader) -> IO[bytes]:
    suffix = os.path.splitext(file.source)[1].lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(raw, "rb"))
    if suffix == ".xz":
        return io.BufferedReader(_XzFile(raw), READ_BYTES)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(raw, file), READ_BYTES)
    return raw


class _XzFile(io.RawIOBase):
    """All streams of an .xz file. The standard library's file has no limit to memory, and takes a second stream that is
    no stream for padding."""

    def __init__(self, raw: io.BufferedReader):
        self._raw = raw
        self._stream = self._new_stream()

    def _new_stream(self) -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(memlimit=XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        """Raises LZMAError, and EOFError for a file that is cut short."""
        while True:
            if self._stream.eof:
                data = self._behind_padding(self._stream.unused_data)
                if not data:
                    return 0
                self._stream = self._new_stream()
            else:
                data = self._raw.read(READ_BYTES) if self._stream.needs_input else b""
                if self._stream.needs_input and not data:
                    raise EOFError("the file ends inside an xz stream")
            piece = self._stream.decompress(data, len(buffer))
            if piece:
                buffer[: len(piece)] = piece
                return len(piece)

    def _behind_padding(self, data: bytes) -> bytes:
        """The beginning of the next stream, or nothing."""
        data = data.lstrip(b"\0")
        while not data and (more := self._raw.read(READ_BYTES)):
            data = more.lstrip(b"\0")
        return data


class _ZstdFile(io.RawIOBase):
    """All frames of a .zst file, some blocks at a time.

    Of `zstandard`'s own ways one takes a file that is cut short for a whole one, and the other gives all that is in the
    bytes it gets: 2 GiB for 60 kB. A block has at most 128 KiB, so the file is cut at its blocks (RFC 8878, 3.1.1.2).
    """

    def __init__(self, raw: io.BufferedReader, file: InputFile):
        try:
            import zstandard
        except ImportError as error:
            raise UserError(
                f"input file {file.name} needs the package zstandard; install it: pip install 'megatron-bit[data]'"
            ) from error
        self._raw, self._file, self._library = raw, file, zstandard
        self._pieces = self._decompress()
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        """Raises EOFError for a truncated file and for one that is no zstd, UserError for too large a window."""
        while not self._pending:
            try:
                piece = next(self._pieces, None)
            except self._library.ZstdError as error:
                raise EOFError(f"not zstd or broken ({error})") from error
            if piece is None:
                return 0
            self._pending = memoryview(piece)
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def _decompress(self) -> Iterator[bytes]:
        decompressor = self._library.ZstdDecompressor(max_window_size=MAX_WINDOW)
        while magic := self._raw.read(4):
            if len(magic) == 4 and magic[1:] == ZSTD_SKIPPED and magic[0] >> 4 == 5:
                self._exactly(int.from_bytes(self._exactly(4), "little"))
                continue
            if magic != ZSTD_MAGIC:
                raise EOFError("not zstd or broken (no frame where one should begin)")
            header = magic + self._exactly(1)
            header += self._exactly(self._library.frame_header_size(header) - len(header))
            about = self._library.get_frame_parameters(header)
            if about.window_size > MAX_WINDOW:
                raise _window(self._file, f"{about.window_size >> 20} MiB, more")
            frame, blocks, last = decompressor.decompressobj(), header, False
            while not last:
                for _ in range(ZSTD_BLOCKS):
                    block = self._exactly(3)
                    last, kind, size = block[0] & 1 == 1, block[0] >> 1 & 3, int.from_bytes(block, "little") >> 3
                    if size > ZSTD_BLOCK_BYTES:
                        raise EOFError("not zstd or broken (a block is too large)")
                    blocks += block + self._exactly(1 if kind == ZSTD_RLE else size)
                    if last:
                        break
                if last and about.has_checksum:
                    blocks += self._exactly(4)
                yield frame.decompress(blocks)
                blocks = b""
            if not frame.eof:
                raise EOFError("not zstd or broken (a frame has no end)")

    def _exactly(self, count: int) -> bytes:
        data = self._raw.read(count)
        if len(data) < count:
            raise EOFError("the file ends inside a zstd frame")
        return data
