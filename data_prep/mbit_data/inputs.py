"""Which files an input names: files, folders, globs and the word `stdlib`, in one fixed order."""

from __future__ import annotations

import glob
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from mbit_data.input_file import DESCRIPTORS, InputFile
from mbit_data.left_out import LeftOut
from mbit_data.spool import spooled
from mbit_data.walk import Identity, file_status, glob_root, matching, walk
from megatron_bit.errors import UserError
from megatron_bit.io.paths import user_path

STDLIB = "stdlib"
# tests are repetitive (and full of broken encodings); site-packages is not the standard library
STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def expand_inputs(
    inputs: Iterable[str], exclude: Path | None = None, left_out: LeftOut | None = None, spool: Path | None = None
) -> list[InputFile]:
    """All files of the inputs: input by input, sorted by source within each, no file twice.

    Hidden files and folders are left out unless named, and so is all below `exclude` (the output folder). Links are
    followed. A pipe (a FIFO, `<(command)`, /dev/stdin) is read to its end into a nameless file in `spool`.
    Raises UserError for an input that does not exist, matches nothing or may not be read; `left_out` counts what is not
    read of folders and globs, and says whether that may be a file or folder without permission.
    """
    left_out = LeftOut() if left_out is None else left_out
    seen: dict[Path, InputFile] = {}
    excluded = exclude.resolve() if exclude is not None else None
    stay_out = _identity(excluded)
    pipes = 0
    for text in inputs:
        found = sorted(_expand_one(text, left_out, stay_out, spool, pipes), key=lambda file: file.source)
        if not found:
            lines = "; ".join(left_out.lines())
            raise UserError(
                f"input {text!r}: no files in it; name a file, a folder, a glob or {STDLIB!r}{lines and f' ({lines})'}"
            )
        for file in found:
            pipes += file.spooled is not None
            path = file.path.resolve()
            if file.spooled is not None or excluded is None or not path.is_relative_to(excluded):
                seen.setdefault(path, file)
    if not seen:
        raise UserError("no input files; name at least one file, folder, glob or 'stdlib'")
    return list(seen.values())


def _identity(folder: Path | None) -> Identity | None:
    if folder is None or not folder.is_dir():
        return None
    status = folder.stat()
    return status.st_dev, status.st_ino


def _expand_one(
    text: str, left_out: LeftOut, exclude: Identity | None, spool: Path | None, pipes: int
) -> Iterator[InputFile]:
    if text == STDLIB:  # a folder of that name is `./stdlib`
        yield from _stdlib()
        return
    path = user_path(text)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if os.path.islink(path):
            raise UserError(f"input {text!r} is a link to {os.readlink(path)!r}: {error.strerror}") from error
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UserError(f"input {text!r} cannot be read: {error.strerror}; fix it or leave it out") from error
        if not glob.has_magic(str(path)):
            raise UserError(f"input {text!r} does not exist; name a file, a folder, a glob or {STDLIB!r}") from error
        yield from _files(matching(path, left_out, exclude), glob_root(path), left_out)
        return
    if stat.S_ISREG(mode):
        if str(path).startswith(DESCRIPTORS):  # `prepare /dev/stdin < FILE`: the name says the format
            path = path.resolve()
        yield _input_file(path, path.parent, os.stat(path), named=True)
    elif stat.S_ISDIR(mode):
        yield from _files(walk(path, left_out, exclude), path, left_out)
    elif stat.S_ISFIFO(mode):
        yield spooled(path, text, spool, pipes)
    else:
        raise UserError(f"input {text!r} is a device or a socket; give a file, a folder, a glob or a pipe")


def _files(paths: Iterable[Path], root: Path, left_out: LeftOut) -> Iterator[InputFile]:
    for path in paths:
        status = file_status(path, left_out)
        if status is not None:
            yield _input_file(path, root, status)


def _stdlib() -> Iterator[InputFile]:
    def stop(error: OSError) -> None:
        raise UserError(f"input folder {error.filename} cannot be read: {error.strerror}") from error

    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, inner, files in os.walk(root, onerror=stop):
        inner[:] = [name for name in inner if not name.startswith(".") and name not in STDLIB_SKIPPED]
        paths = (Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("."))
        yield from _files(paths, root, LeftOut())


def _input_file(path: Path, root: Path, status: os.stat_result, named: bool = False) -> InputFile:
    return InputFile(path, path.relative_to(root).as_posix(), status.st_size, named, status.st_mtime_ns)
