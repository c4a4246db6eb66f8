"""A command in a child of this process, which has torch already: half a second instead of four."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

LIMIT_SECONDS = 60
LIMIT_BYTES = 3 << 30  # beyond what the warm process has


@dataclass(frozen=True)
class Ended:
    code: int | str  # "hangs" if it was killed
    out: str
    err: str
    peak: int  # bytes resident


def warm() -> None:
    """Import what the commands import."""
    import torch

    from megatron_bit.optim import zero
    from megatron_bit.parallel import mcore

    zero._import_deepspeed()
    mcore.prepare()
    torch.set_num_threads(1)


def command(words: list[str], cwd: Path, home: Path) -> Ended:
    """Run `megatron-bit WORDS`; killed with all its children after LIMIT_SECONDS."""
    out, err = home / "out", home / "err"
    pid = os.fork()
    if pid == 0:
        _child(words, cwd, home, out, err)
    deadline, killed = time.monotonic() + LIMIT_SECONDS, False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline and not killed:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            killed = True
        time.sleep(0.01)
    code = "hangs" if killed else os.waitstatus_to_exitcode(status)
    texts = [path.read_text(errors="replace") if path.exists() else "" for path in (out, err)]
    return Ended(code, texts[0], texts[1], usage.ru_maxrss * 1024)


def real(words: list[str], cwd: Path, home: Path) -> Ended:
    """The same by the installed command, in a process of its own."""
    dirs = {"HOME": str(home), "XDG_STATE_HOME": str(home / "state"), "XDG_CACHE_HOME": str(home / "cache")}
    command = [str(Path(sys.executable).with_name("megatron-bit")), *words]
    try:
        done = subprocess.run(
            command, cwd=cwd, env={**os.environ, **dirs}, capture_output=True, timeout=4 * LIMIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Ended("hangs", "", "", 0)
    return Ended(done.returncode, *(text.decode(errors="replace") for text in (done.stdout, done.stderr)), peak=0)


def _child(words: list[str], cwd: Path, home: Path, out: Path, err: Path) -> None:
    code = 99
    try:
        os.setsid()
        os.chdir(cwd)
        os.environ.update(HOME=str(home), XDG_STATE_HOME=str(home / "state"), XDG_CACHE_HOME=str(home / "cache"))
        for descriptor, target in ((1, out), (2, err)):
            os.dup2(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(descriptor), "w") for descriptor in (1, 2))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + LIMIT_BYTES,) * 2)
        from megatron_bit import cli

        sys.argv = ["megatron-bit", *words]
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
