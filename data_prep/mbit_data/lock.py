"""One prepare at a time for a folder, or for a part of it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mbit_data.progress import Reporter
from megatron_bit.errors import UserError


@contextmanager
def only_one(path: Path, report: Reporter) -> Iterator[Callable[[], None]]:
    """Hold an flock on `path`: a folder that is there, or a file that is made for it and removed.

    The kernel gives it back however the process ends. Where the file system has no locks, it says so and goes on.
    What it yields raises UserError if another file or folder stands there by now. Raises UserError if another process
    holds it, OSError.
    """
    folder = path.is_dir()
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.exists(path) or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                raise BlockingIOError  # whoever held it has just removed the file
        except BlockingIOError:
            raise UserError(
                f"another prepare is at work on {path}; wait for it, stop it, or choose another folder"
            ) from None
        except OSError as error:  # an flock on a folder is one of those that NFS does not have
            report.line(f"note: {path} cannot be locked here ({error.strerror}): start no second prepare for it")

        def check() -> None:
            if not os.path.exists(path) or not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                raise UserError(f"{path} was removed or replaced meanwhile; nothing is written there")

        yield check
        if not folder:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
