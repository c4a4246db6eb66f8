"""Files of known content on the node's disk, shared by its processes, with a limit to their size.

A file is named by its SHA-256 and appears when it is whole. One process fetches it while the others wait; the ones that
were not used for longest make room. An open file stays readable when it is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from megatron_bit.errors import UserError
from megatron_bit.io.files import PARTIAL


class ShardCache:
    """The cache in one folder; `limit` bytes, and one file more while it is fetched."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Raises OSError."""
        self.folder, self.limit = folder, limit
        (folder / "locks").mkdir(parents=True, exist_ok=True)

    def open(self, sha256: str, fetch: Callable[[Path], None]) -> IO[bytes]:
        """The file with that content, made by `fetch(path)` if it is not there.

        Raises what `fetch` does, OSError; UserError if that is no SHA-256.
        """
        path = self._path(sha256)
        while True:
            with contextlib.suppress(FileNotFoundError):
                file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)
                return file
            with self._locked(sha256[:2]):
                if not path.exists():
                    fetch(path)
                    self._shrink(self.limit, keep=path)

    def discard(self, sha256: str, file: IO[bytes]) -> None:
        """Remove the file, which `file` is, unless another process has put a new one in its place. Raises OSError."""
        path = self._path(sha256)
        with self._locked(sha256[:2]), contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                os.unlink(path)

    def _path(self, sha256: str) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", sha256):  # another name would lead out of the folder
            raise UserError(f"a file is kept under its SHA-256, and {sha256!r} is none; copy the manifest again")
        return self.folder / sha256

    def clear(self) -> bool:
        """Make what room there is, on a full disk; whether anything could go."""
        return self._shrink(0, keep=None)

    def _shrink(self, limit: int, keep: Path | None) -> bool:
        with self._locked("shrink"):
            found = []
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file() and not entry.name.endswith(PARTIAL):
                        found.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
            total, removed = sum(size for _, size, _ in found), False
            for _, size, path in sorted(found):
                if total <= limit:
                    break
                if path != str(keep):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
                    total, removed = total - size, True
            return removed

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(self.folder / "locks" / name, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the holder's waits have time-outs, and its death frees it
            yield
