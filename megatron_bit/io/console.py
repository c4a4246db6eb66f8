"""A console that may go away: `| head`, a full disk behind `>`, a closed descriptor, a terminal that is lost.

What a run prints is for somebody who looks on; the run itself is in its folder. Imports no torch.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO, cast


class Console(io.TextIOBase):
    """Standard output or error that never raises: what cannot be written is dropped, and `lost` says why."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost = ""

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        return not self.lost and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def _try(self, action) -> None:
        if self.lost:
            return
        try:
            action()
        except (OSError, ValueError) as error:
            self.lost = getattr(error, "strerror", None) or str(error)
            # what is buffered is written when Python ends, and would fail once more and change the exit code
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)


def keep_descriptors() -> None:
    """Give a closed standard descriptor to /dev/null; the next file that is opened would get its number, and with it
    whatever a library prints. Names that are no text are shown escaped instead of ending the command."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def outlive() -> None:
    """From here on this process goes on without its console."""
    sys.stdout, sys.stderr = cast(TextIO, Console(sys.stdout)), cast(TextIO, Console(sys.stderr))


def lost() -> str:
    """Why standard output is gone; empty while it is there."""
    return sys.stdout.lost if isinstance(sys.stdout, Console) else ""
