"""A file of text or records, whoever named it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

DESCRIPTORS = ("/dev/fd/", "/dev/std", "/proc/")  # where names say nothing about what is read


@dataclass(frozen=True)
class InputFile:
    """A file to read. `source` is its path relative to the input it came from, with forward slashes."""

    path: Path
    source: str
    size: int  # bytes on disk
    named: bool  # the user named this very file, so it may not be left out
    written: int  # when its bytes were last changed, in ns; with the size, whether it is still what was looked at
    sha256: str = ""  # of the bytes on disk, once they were read
    spooled: IO[bytes] | None = field(default=None, compare=False, repr=False)  # keeps `path` open: what a pipe gave
    given: str = ""  # the name of a pipe

    @property
    def name(self) -> str:
        """For messages."""
        return self.given or str(self.path)
