"""Open an input file and read what is inside it: plain, .gz, .xz or .zst."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from typing import IO, cast

from mbit_data.inputs import InputFile
from megatron_bit.errors import UserError

COMPRESSED = (".gz", ".xz", ".zst")
ZSTD_READ_BYTES = 128 * 1024
ZSTD_MAX_WINDOW = 1 << 31  # `zstd --long=31`, the largest there is


def format_suffix(source: str) -> str:
    """The suffix without that of the compression, in lower case: `.txt` for `a.TXT.xz`."""
    stem, suffix = os.path.splitext(source)
    return (os.path.splitext(stem)[1] if suffix.lower() in COMPRESSED else suffix).lower()


@contextmanager
def open_input(file: InputFile) -> Iterator[tuple[IO[bytes], BufferedReader]]:
    """The decompressed bytes and the file on disk below it, whose position is the progress.

    What goes wrong with either, also later while reading, becomes a UserError naming the file.
    """
    try:
        with open(file.path, "rb") as raw:
            yield _decompressed(file, raw), raw
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"input file {file.path} is damaged: {error}; copy it again") from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"input file {file.path} cannot be read: {reason}; fix it or leave it out") from error


def _decompressed(file: InputFile, raw: BufferedReader) -> IO[bytes]:
    suffix = file.path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(raw, "rb"))
    if suffix == ".xz":
        return cast(IO[bytes], lzma.open(raw, "rb"))
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(raw, file), ZSTD_READ_BYTES)
    return raw


class _ZstdFile(io.RawIOBase):
    """All frames of a .zst file. `zstandard`'s own stream reader takes a file that is cut short for a whole one."""

    def __init__(self, raw: BufferedReader, file: InputFile):
        try:
            import zstandard
        except ImportError as error:
            raise UserError(
                f"input file {file.path} needs the package zstandard; install it: pip install 'megatron-bit[data]'"
            ) from error
        self._raw = raw
        self._library = zstandard
        self._frame = self._new_frame()
        self._pending = memoryview(b"")
        self._begun = False  # inside a frame

    def _new_frame(self):
        return self._library.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW).decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        """Raises EOFError for a truncated file, and for one that is no zstd at all."""
        while not self._pending:
            data = self._raw.read(ZSTD_READ_BYTES)
            if not data:
                if self._begun:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            try:
                self._pending = memoryview(self._frame.decompress(data))
            except self._library.ZstdError as error:
                raise EOFError(f"not zstd or broken ({error})") from error
            self._begun = True
            if self._frame.eof:
                self._raw.seek(-len(self._frame.unused_data), os.SEEK_CUR)  # it belongs to the next frame
                self._begun, self._frame = False, self._new_frame()
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count
