"""What of the inputs is not read although it is there: counted by reason, and named."""

from __future__ import annotations

import os
from typing import Literal

from megatron_bit.errors import UserError

OnError = Literal["stop", "skip"]
ON_ERROR = ("stop", "skip")
BINARY = "binary file"
DANGLING = "dangling link"
SPECIAL = "special file"  # a FIFO, a socket, a device
UNREADABLE = "unreadable file"
UTF16 = "UTF-16 file"
NAMED = 3  # of a reason, in a line for people


class LeftOut:
    """Files and folders that folders and globs brought in; what the user names is read or refused."""

    def __init__(self, on_error: OnError = "stop") -> None:
        """`on_error`: whether what may not be read ends the work, or is left out as well."""
        self.on_error = on_error
        self._found: dict[str, dict[str, None]] = {}

    def add(self, reason: str, path: str | os.PathLike[str]) -> None:
        self._found.setdefault(reason, {})[os.fspath(path)] = None

    def unless_stop(self, reason: str, path: str | os.PathLike[str], problem: str) -> None:
        """Raises UserError, or counts it, as `on_error` says."""
        if self.on_error == "stop":
            raise UserError(f"{problem}; fix it, take it out of the input, or leave it out with --on-error skip")
        self.add(reason, path)

    def unreadable(self, kind: Literal["file", "folder"], path: str | os.PathLike[str], error: OSError) -> None:
        """Raises UserError, or counts it, as `on_error` says."""
        problem = f"input {kind} {os.fspath(path)} cannot be read: {error.strerror or error}"
        self.unless_stop(f"unreadable {kind}", path, problem)

    @property
    def counts(self) -> dict[str, int]:
        """By reason, as `dropped` of a manifest has them."""
        return {reason: len(paths) for reason, paths in sorted(self._found.items())}

    def lines(self) -> list[str]:
        """One for each reason, with the first paths."""
        return [
            f"left out: {len(paths):,} {reason}{'s' * (len(paths) > 1)} "
            f"({', '.join(list(paths)[:NAMED])}{', ...' * (len(paths) > NAMED)})"
            for reason, paths in sorted(self._found.items())
        ]
