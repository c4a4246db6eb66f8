"""Files below a folder, and those that a glob matches: links followed, nothing left out in silence.

Python's own `os.walk` and `glob` leave out what may not be read without a word, and differ in the links they follow.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import stat
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from mbit_data.left_out import DANGLING, SPECIAL, LeftOut
from megatron_bit.errors import UserError

Identity = tuple[int, int]  # device and inode


def walk(root: Path, left_out: LeftOut, exclude: Identity | None = None) -> Iterator[Path]:
    """Every file, those with hidden names or in hidden folders left out. See `folders`."""
    for _, others in folders(root, left_out, exclude):
        yield from others


def folders(root: Path, left_out: LeftOut, exclude: Identity | None = None) -> Iterator[tuple[Path, list[Path]]]:
    """`root` and every folder below with what is in it and is no folder; links to folders are followed.

    Each folder comes once, by its own name if it lies below `root`, else by the first link to it: so a loop has an end.
    `exclude` is a folder to stay out of. Raises UserError for a folder that may not be read, or `left_out` counts it.
    """
    seen = set() if exclude is None else {exclude}
    linked = deque([root])
    while linked:
        stack = [linked.popleft()]
        while stack:
            folder, inner = stack.pop(), []
            try:
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as scan:
                    entries = sorted(scan, key=lambda entry: entry.name)
            except OSError as error:
                left_out.unreadable("folder", folder, error)
                continue
            others = []
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = Path(folder, entry.name)
                if not entry.is_symlink():
                    (inner if entry.is_dir(follow_symlinks=False) else others).append(path)
                elif os.path.isdir(path):
                    linked.append(path)
                else:
                    others.append(path)
            yield folder, others
            stack += reversed(inner)


def file_status(path: Path, left_out: LeftOut) -> os.stat_result | None:
    """Of a file to read; None for a folder and for what `left_out` counts. Raises UserError as that does."""
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) and os.path.islink(path):
            left_out.add(DANGLING, path)
        elif error.errno == errno.ENOENT:
            raise UserError(f"input file {path} has gone while the inputs were looked through; run it again") from error
        else:
            left_out.unreadable("file", path, error)
        return None
    if stat.S_ISREG(status.st_mode):
        return status
    if not stat.S_ISDIR(status.st_mode):
        left_out.add(SPECIAL, path)
    return None


def glob_root(pattern: Path) -> Path:
    """The part of a pattern that is no pattern."""
    while glob.has_magic(str(pattern)):
        pattern = pattern.parent
    return pattern


def matching(pattern: Path, left_out: LeftOut, exclude: Identity | None = None) -> Iterator[Path]:
    """What a glob means: matching files, and those below matching folders. `**` is every folder, as in `folders`."""
    root = glob_root(pattern)
    try:
        os.stat(root)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        left_out.unreadable("folder", root, error)
        return
    for path in _match(root, pattern.parts[len(root.parts) :], left_out, exclude):
        if os.path.isdir(path):
            yield from walk(path, left_out, exclude)
        else:
            yield path


def _match(folder: Path, parts: tuple[str, ...], left_out: LeftOut, exclude: Identity | None) -> Iterator[Path]:
    part, rest = parts[0], parts[1:]
    if part == "**":
        for below, others in folders(folder, left_out, exclude):
            yield from _match(below, rest, left_out, exclude) if rest else iter(others)
        return
    try:
        if glob.has_magic(part):
            hidden = part.startswith(".")
            names = [name for name in os.listdir(folder) if name.startswith(".") <= hidden]
            found = [folder / name for name in sorted(fnmatch.filter(names, part))]
        else:
            os.lstat(folder / part)
            found = [folder / part]
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        left_out.unreadable("folder", folder, error)
        return
    for path in found:
        if not rest:
            yield path
        elif os.path.isdir(path):
            yield from _match(path, rest, left_out, exclude)
