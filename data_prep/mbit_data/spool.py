"""What comes through a pipe, which can be read once: kept in a nameless file, since inputs are read twice."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from mbit_data.decompress import open_input
from mbit_data.input_file import DESCRIPTORS, InputFile
from mbit_data.records import BOM, MAX_LINE
from megatron_bit.errors import UserError

MAGIC = {b"\x1f\x8b": ".gz", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}


def spooled(path: Path, text: str, folder: Path | None, number: int) -> InputFile:
    """All that the pipe gives, in a file of `folder` (None: the system's for such files) that goes with this process.

    A FIFO's name says the format, as a file's does. What has no name of its own (/dev/fd/63) is `pipe-<number>`, and
    the format is seen in it: compression, Parquet, lines of JSON objects, else text. Raises UserError.
    """
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        target = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as the InputFile)
        with open(path, "rb") as source:
            shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
    except OSError as error:
        where = folder or tempfile.gettempdir()
        raise UserError(f"input {text!r} cannot be kept in {where}: {error.strerror or error}") from error
    status = os.fstat(target.fileno())
    name = f"pipe-{number}" if str(path).startswith(DESCRIPTORS) else path.name
    # opened anew by this name, so that every reader has a position of its own
    kept = Path(f"/proc/{os.getpid()}/fd/{target.fileno()}")
    file = InputFile(kept, name, status.st_size, True, status.st_mtime_ns, spooled=target, given=text)
    return file if name == path.name else _with_format(file)


def _with_format(file: InputFile) -> InputFile:
    """The same with a suffix that says what is in it."""
    with open(file.path, "rb") as raw:
        start = raw.read(max(map(len, MAGIC)))
    suffix = next((suffix for magic, suffix in MAGIC.items() if start.startswith(magic)), "")
    if suffix != ".parquet":
        with open_input(replace(file, source=file.source + suffix)) as opened:
            line = opened.stream.readline(MAX_LINE).removeprefix(BOM)
        suffix = f"{'.jsonl' if _is_object(line) else '.txt'}{suffix}"
    return replace(file, source=file.source + suffix)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
