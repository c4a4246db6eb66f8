"""`megatron-bit` in a fork of the fork server, which has torch already: half a second instead of four.

The fork server and not the process of the tests: a fork of one whose threads have computed waits for them for ever.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gloo_ranks import fork_server
from mbit_launcher.local import choose_port


@dataclass(frozen=True)
class Ended:
    code: int | str  # of the first rank whose is not 0; "hangs" if it was killed
    out: str  # of all ranks, one after the other
    err: str
    peak: int = 0  # bytes resident of the largest rank


def command(
    words: list[str],
    folder: Path,
    *,
    cwd: Sequence[Path | str] = (),
    env: dict[str, str] | None = None,
    ranks: int = 1,
    timeout: float = 60,
    memory: int | None = None,
) -> Ended:
    """Run `megatron-bit WORDS`; killed with all its children after `timeout` seconds.

    folder: of what the ranks write. cwd: of each rank. memory: bytes of address space beyond what the server has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    here: dict[str, str] = dict(env or {})
    if ranks > 1:
        here |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(choose_port())}
    processes = []
    for rank in range(ranks):
        own = {**here, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else here
        where = str(cwd[rank]) if cwd else None
        process = fork_server().Process(target=_enter, args=(words, str(folder / str(rank)), where, own, memory))
        process.start()
        processes.append(process)
    deadline = time.monotonic() + timeout
    codes: list[int | str] = []
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            for kill in (os.killpg, os.kill):  # not a leader yet if it is killed in its first moments
                with contextlib.suppress(ProcessLookupError):
                    kill(process.pid, signal.SIGKILL)
            process.join()
            codes.append("hangs")
        else:
            codes.append(process.exitcode)

    def wrote(rank: int, what: str) -> str:
        path = folder / f"{rank}.{what}"
        return path.read_text(errors="replace") if path.exists() else ""

    out, err = ("".join(wrote(rank, what) for rank in range(ranks)) for what in ("out", "err"))
    peak = max(int(wrote(rank, "peak") or 0) for rank in range(ranks))
    return Ended(next((code for code in codes if code), 0), out, err, peak)


def real(words: list[str], *, cwd: Path, env: dict[str, str], timeout: float = 240) -> Ended:
    """The same by the installed command, in a process of its own."""
    command = [str(Path(sys.executable).with_name("megatron-bit")), *words]
    try:
        done = subprocess.run(
            command, cwd=cwd, env={**os.environ, **env}, capture_output=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return Ended("hangs", "", "")
    return Ended(done.returncode, *(text.decode(errors="replace") for text in (done.stdout, done.stderr)))


def _enter(words: list[str], wrote: str, cwd: str | None, env: dict[str, str], memory: int | None) -> None:
    """In the fork."""
    code = 99
    try:
        os.setsid()
        os.environ.update(env)
        for descriptor, what in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{wrote}.{what}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(descriptor), "w") for descriptor in (1, 2))
        if cwd is not None:
            os.chdir(cwd)
        if memory is not None:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (size + memory,) * 2)
        from megatron_bit import cli

        sys.argv = ["megatron-bit", *words]
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        Path(f"{wrote}.peak").write_text(str(most * 1024))
        os._exit(code)
