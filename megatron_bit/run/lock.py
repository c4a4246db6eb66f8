"""One training job a run folder. Imports no torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_bit.errors import UserError


class RunLock:
    """An flock on RUN/lock, held while the process lives; the file says by whom.

    The kernel gives it back when the process ends, however it ends, so that a killed job leaves nothing to clean up.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / "lock"
        self._file: Any = None

    def acquire(self) -> str | None:
        """Take the lock. Returns a warning where the file system has no locks.

        Raises:
            UserError: another process holds it; the message says which.
            OSError: the folder cannot be written.
        """
        file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115  # held open until the process ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"run folder {self._path.parent} is in use by {_named(holder)}; wait for it, stop it, or give "
                    "another run=... folder"
                ) from None
            return f"{self._path} cannot be locked here ({error.strerror}): take care that no other job uses this run"
        file.truncate(0)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        json.dump({**me, "slurm_job": os.environ.get("SLURM_JOB_ID")}, file)
        file.flush()
        self._file = file
        return None

    def lost(self) -> str:
        """Why the run folder is not this job's any more: it was removed, or moved, and another may stand in its place.
        Empty while it is."""
        if self._file is None:
            return ""
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return f"run folder {self._path.parent} is gone: it was removed or moved away"
        except OSError:
            return ""  # a disk that does not answer is no other folder
        held = os.fstat(self._file.fileno())
        if (there.st_dev, there.st_ino) != (held.st_dev, held.st_ino):
            return f"run folder {self._path.parent} is another one than this job began in: it was replaced"
        return ""

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass(frozen=True)
class Holder:
    """The process that trains a run, or was the last to."""

    host: str
    pid: int
    since: str
    slurm_job: str | None
    alive: bool | None  # None: it is of another host, and cannot be asked from here


def holder(run: Path) -> Holder | None:
    """Who has taken the lock of a run; None where nobody has, or the file is no record of it.

    Looks only: to try the lock would take it for a moment, in which the run could not begin.
    """
    path = run / "lock"
    try:
        held = _parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if held is None or held.host != socket.gethostname():
        return held
    return replace(held, alive=_has_open(held.pid, path))


def _parsed(text: str) -> Holder | None:
    """Who a lock file says has taken it; None if it is no such record."""
    try:
        said = json.loads(text)
        job = said.get("slurm_job")
        return Holder(str(said["host"]), int(said["pid"]), str(said["since"]), str(job) if job else None, None)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _has_open(pid: int, path: Path) -> bool:
    """Whether a process of this machine has a file open: another may have got the number of one that has ended."""
    try:
        there = os.stat(path)
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                mine = os.stat(f"/proc/{pid}/fd/{name}")
                if (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
                    return True
    except OSError:
        pass
    return False


def _named(text: str) -> str:
    held = _parsed(text)
    if held is None:
        return "another process"
    job = f", SLURM job {held.slurm_job}" if held.slurm_job else ""
    return f"process {held.pid} on {held.host} since {held.since}{job}"
