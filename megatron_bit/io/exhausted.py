"""What a process can run out of: how such an error is known, and what is said of it. Imports no torch."""

from __future__ import annotations

import errno
import os
import resource
import socket
import traceback
from pathlib import Path

from megatron_bit.errors import Exhausted, Stopped

MEMORY, THREADS, DESCRIPTORS = "memory", "threads or processes", "file descriptors"
_NUMBERS = {
    errno.ENOMEM: MEMORY,
    errno.EMFILE: DESCRIPTORS,
    errno.ENFILE: DESCRIPTORS,
}  # EAGAIN is also what a socket says that has nothing to read; of a process that is not started it has a class
_WORDS = {
    MEMORY: ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory", "ALLOC_FAILED"),
    THREADS: ("can't start new thread",),
    DESCRIPTORS: ("Too many open files",),
}
_OURS = ("megatron_bit", "mbit_data", "mbit_launcher", "mbit_kernels")


def resource_of(error: BaseException | None) -> str | None:
    """Which resource ran out, if that is what this error, or the one that it was raised for, means; else None."""
    root = _root(error)
    return None if root is None else _kind(root)


def exhausted(error: BaseException, rank: int | None = None, ranks: int = 1) -> Exhausted | None:
    """The one line for such an error, of this process; None if it is another one.

    Args:
        rank: of a job of `ranks`, whose others hear of it.
    """
    root = _root(error)
    if root is None or isinstance(error, Stopped):
        return None
    if isinstance(error, Exhausted):
        return error
    what = _kind(root)
    assert what is not None
    who = f"{'this process' if rank is None else f'rank {rank}'} on {socket.gethostname()}"
    said = " ".join(str(root).split())[:200] or type(root).__name__
    more = "; the same command goes on from the newest checkpoint" if rank is not None else ""
    of = f" of {ranks} ranks" if ranks > 1 else ""
    return Exhausted(f"{who}{of} ran out of {what}: {said}{_place(root)}; {_advice(what, rank is not None)}{more}")


def _root(error: BaseException | None) -> BaseException | None:
    """The innermost error of a chain that says that something ran out."""
    found, seen = None, set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, Exhausted) or _kind(error) is not None:
            found = error
        error = error.__cause__ or error.__context__
    return found


def _kind(error: BaseException) -> str | None:
    if isinstance(error, MemoryError):
        return MEMORY
    if isinstance(error, OSError):
        return THREADS if isinstance(error, BlockingIOError) and _forks(error) else _NUMBERS.get(error.errno or 0)
    if isinstance(error, RuntimeError):  # of torch, gloo and threading
        text = str(error)
        if text == os.strerror(errno.EAGAIN):  # a thread of C++; in a longer text it is a socket's
            return THREADS
        return next((kind for kind, words in _WORDS.items() if any(word in text for word in words)), None)
    return None


def _forks(error: BlockingIOError) -> bool:
    """Whether it was a new process that could not be had."""
    return any(
        frame.name in ("_execute_child", "_launch", "_spawn") for frame in traceback.extract_tb(error.__traceback__)
    )


def _place(error: BaseException) -> str:
    """Where in our files, for whoever looks into it."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if any(part in _OURS for part in path.parts):
            return f" ({path.name}:{frame.lineno})"
    return ""


def _advice(what: str, trains: bool) -> str:
    if what == DESCRIPTORS:
        allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = "any number" if most < 0 else most
        return f"`ulimit -n` allows {allowed}; allow more (up to {most} without an administrator)"
    if what == THREADS:
        return f"`ulimit -u` allows {_shown(resource.RLIMIT_NPROC)}; a container or a job may allow fewer (pids.max)"
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    own = "" if limit < 0 else f"`ulimit -v` allows {limit // 1024} KiB; "
    if trains:
        return f"{own}`train --dry-run` says what a rank needs: have smaller micro-batches, more ranks or more memory"
    return f"{own}ask for less at a time, or use a machine with more"


def _shown(which: int) -> str:
    allowed = resource.getrlimit(which)[0]
    return "any number" if allowed == resource.RLIM_INFINITY else str(allowed)


def open_now() -> int:
    """Descriptors that this process has open."""
    return len(os.listdir("/proc/self/fd")) - 1  # the listing itself
