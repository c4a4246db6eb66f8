"""Files that a crash cannot leave half-written under their final name. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

PARTIAL = ".partial"  # ends the name of a file that is still being written


def write_synced(path: Path, data: bytes) -> None:
    """The file is on the disk when this returns. Raises OSError."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes) -> None:
    """The file appears under its name complete, or not at all. Raises OSError."""
    partial = path.with_name(path.name + PARTIAL)
    write_synced(partial, data)
    os.replace(partial, path)
    sync_folder(path.parent)


def announce(path: Path, data: bytes) -> None:
    """As `write_atomic`, and nothing is done behind the moment at which the file is there: who waits for it may move or
    remove its folder at once, and sees to it that the name lasts. Raises OSError."""
    partial = path.with_name(path.name + PARTIAL)
    write_synced(partial, data)
    sync_folder(path.parent)
    os.replace(partial, path)


def sync_folder(folder: Path) -> None:
    """Make renames in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lines_of(content: bytes) -> list[str]:
    """The lines of a text file, without a byte order mark and the ends of lines: \\n or \\r\\n, and nothing else.

    What str.splitlines takes for more ends (U+2028, form feeds, ...) is text. ValueError if it is not UTF-8.
    """
    lines = content.decode("utf-8-sig").split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
