"""Which files an input names: files, folders, globs and the word `stdlib`, in one fixed order."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_bit.errors import UserError

STDLIB = "stdlib"
# tests are repetitive (and full of broken encodings); site-packages is not the standard library
STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class InputFile:
    """A file to read. `source` is its path relative to the input it came from, with forward slashes."""

    path: Path
    source: str
    size: int  # bytes on disk
    named: bool  # the user named this very file, so it may not be skipped silently


def expand_inputs(inputs: Iterable[str], exclude: Path | None = None) -> list[InputFile]:
    """All files of the inputs: input by input, sorted by source within each, no file twice.

    Hidden files and folders are left out unless named, and so is all below `exclude` (the output folder).
    Raises UserError for an input that does not exist or matches nothing.
    """
    seen: dict[Path, InputFile] = {}
    excluded = exclude.resolve() if exclude is not None else None
    for text in inputs:
        found = sorted(_expand_one(text), key=lambda file: file.source)
        if not found:
            raise UserError(f"input {text!r}: no files in it; name a file, a folder, a glob or {STDLIB!r}")
        for file in found:
            path = file.path.resolve()
            if excluded is None or not path.is_relative_to(excluded):
                seen.setdefault(path, file)
    if not seen:
        raise UserError("no input files; name at least one file, folder, glob or 'stdlib'")
    return list(seen.values())


def _expand_one(text: str) -> Iterator[InputFile]:
    path = Path(text).expanduser()
    if text == STDLIB:  # a folder of that name is `./stdlib`
        yield from _stdlib()
    elif path.is_file():
        yield _input_file(path, path.parent, named=True)
    elif path.is_dir():
        yield from _walk(path)
    elif glob.has_magic(text):
        yield from _glob(str(path))
    else:
        raise UserError(f"input {text!r} does not exist; name a file, a folder, a glob or {STDLIB!r}")


def _walk(root: Path, skipped: frozenset[str] | set[str] = frozenset()) -> Iterator[InputFile]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield _input_file(path, root)


def _stdlib() -> Iterator[InputFile]:
    for file in _walk(Path(sysconfig.get_paths()["stdlib"]), STDLIB_SKIPPED):
        if file.path.suffix == ".py":
            yield file


def _glob(pattern: str) -> Iterator[InputFile]:
    root = Path(pattern)
    while glob.has_magic(str(root)):
        root = root.parent
    for match in glob.iglob(pattern, recursive=True):
        path = Path(match)
        if path.is_file():
            yield _input_file(path, root)
        elif path.is_dir() and not pattern.endswith("**"):
            for file in _walk(path):
                yield _input_file(file.path, root)


def _input_file(path: Path, root: Path, named: bool = False) -> InputFile:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"input file {path} cannot be read: {error.strerror}") from error
    return InputFile(path, path.relative_to(root).as_posix(), size, named)
