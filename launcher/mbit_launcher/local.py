"""N ranks of one command on this machine: what torchrun does for one node, without torch in the parent.

Linux only. Call it from the main thread of a process that has no other threads: signals are taken with
`sigtimedwait`, and a thread that does not block them would be handed them instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from megatron_bit.errors import (
    EXIT_DIVERGED,
    EXIT_EXHAUSTED,
    EXIT_PREEMPTED,
    EXIT_RANK_LOST,
    EXIT_USER_ERROR,
    UserError,
)

# -P keeps the working folder off sys.path, or `import kernels` would find the folder of a checkout.
COMMAND = (sys.executable, "-P", "-m", "megatron_bit")
SHORT_GRACE_SECONDS = 10.0
LOST_GRACE_SECONDS = 4.0  # of the ranks beside one that does not answer
_PR_SET_PDEATHSIG = 1
# What the ranks get for what the parent gets. A lost terminal is a reason to save, too.
_FORWARD = {
    signal.SIGINT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
}
_Running = dict[int, subprocess.Popen[bytes]]  # rank -> process, of those that have not ended


class _Exit(NamedTuple):
    rank: int
    code: int  # negative: minus the signal that killed it
    stopped: bool  # after the launcher itself had begun to stop the ranks


def run_local(
    args: Sequence[str],
    nproc: int,
    *,
    port: int | None = None,
    env: Mapping[str, str] | None = None,
    grace_seconds: float = 60,
    command: Sequence[str] = COMMAND,
) -> int:
    """Run `command` + `args` as `nproc` ranks and wait for all of them.

    `env` takes the place of os.environ as what the ranks' environment starts from. After a rank ends with 85
    (saved on a signal) the others have `grace_seconds` to end as well, after any other failure at most 10 s;
    then they get SIGTERM and, after at most 10 s more, SIGKILL.

    Returns 0 if all ranks did; 2, 86, 87 or 88 if one exited with that; else the code of the first rank that failed
    (128 + signal if one killed it); else 85 if one exited with 85. Raises UserError for a bad `nproc` or `port`.
    """
    if nproc < 1:
        raise UserError(f"nproc = {nproc} has to be at least 1: the processes to start on this machine")
    base = _environment(os.environ if env is None else env, nproc, choose_port(port))
    # Blocked, so that no signal is lost while ranks start. Under nohup SIGHUP is ignored, and has to stay so.
    watched = {s for s in _FORWARD if signal.getsignal(s) is not signal.SIG_IGN} | {signal.SIGCHLD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    ranks: _Running = {}
    try:
        setup = _child_setup(os.getpid(), mask)
        sys.stdout.flush()
        # Each in its own session: Ctrl-C reaches the parent alone, and a group can be killed as a whole.
        for rank in range(nproc):
            ranks[rank] = subprocess.Popen(
                [*command, *args],
                env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=setup,
            )
        exits = _watch(ranks, watched, grace_seconds)
    finally:
        _kill(ranks.values())  # some are left only after an exception: a command that does not exist
        for process in ranks.values():
            process.wait()
        while signal.sigtimedwait(watched, 0):  # a late Ctrl-C is not to interrupt the caller
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return _result(exits, nproc)


def choose_port(port: int | None = None) -> int:
    """A free TCP port, or `port` if no one listens on it; else UserError.

    Below the ephemeral ports (from 32768 on) and those of SLURM jobs (from 20000 on): an outgoing connection of
    whatever else runs here could take one of these before rank 0 listens.
    """
    for _ in range(100 if port is None else 0):
        candidate = 10_000 + secrets.randbelow(10_000)
        with contextlib.suppress(OSError), socket.create_server(("", candidate)):
            return candidate
    if port is not None and not 0 < port < 65536:
        raise UserError(f"port {port} is not a TCP port; choose 1024 to 65535, or leave it out")
    try:
        with socket.create_server(("", port or 0)) as server:
            return server.getsockname()[1]
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = os.strerror(error.errno or 0)
        reason = "is taken by another process" if taken else f"cannot be used ({why})"
        raise UserError(f"port {port} {reason}; choose another, or leave it out to get a free one") from None


def _environment(base: Mapping[str, str], nproc: int, port: int) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0))
    defaults = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": str(max(1, cores // nproc))}
    world = {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
    return {**defaults, **base, **world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _child_setup(parent: int, mask: Iterable[int]) -> Callable[[], None]:
    # Looked up before the fork: a lock that is held then is held for ever in the child.
    prctl = ctypes.CDLL(None).prctl

    def setup() -> None:
        # The kernel kills this process when the parent dies, even by SIGKILL, which no handler sees. It
        # survives exec, not fork: helpers of a rank are the rank's to end. If the parent died before the
        # call, stop here.
        if prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) or os.getppid() != parent:
            os._exit(1)
        for number in _FORWARD:  # drops a Ctrl-C that came between fork and setsid; the parent forwards it
            signal.signal(number, signal.SIG_IGN)
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    return setup


def _watch(ranks: _Running, watched: set[signal.Signals], grace: float) -> list[_Exit]:
    """Wait until all have ended; takes each out of `ranks`. The result is in the order of their ends."""
    short = min(SHORT_GRACE_SECONDS, grace)
    exits: list[_Exit] = []
    sent: set[signal.Signals] = set()
    interrupts, deadline, stopped = 0, float("inf"), False
    while ranks:
        # Never long: should the caller have threads after all, one of them may swallow a SIGCHLD.
        info = signal.sigtimedwait(watched, max(0.0, min(deadline - time.monotonic(), 0.5)))
        number = signal.Signals(info.si_signo) if info else signal.SIGCHLD
        forwarded = _FORWARD.get(number)
        if forwarded and forwarded not in sent:
            sent.add(forwarded)
            for process in ranks.values():  # not the group: a rank ends its helpers when it has saved
                os.kill(process.pid, forwarded)
        if number is signal.SIGINT:
            interrupts += 1
            if interrupts == 1:
                print("Ctrl-C: the ranks save and stop; again to kill them", file=sys.stderr, flush=True)
            else:
                stopped = True
                _kill(ranks.values())
        for rank, process in list(ranks.items()):
            if _ended(process):
                del ranks[rank]
                exits.append(_Exit(rank, process.wait(), stopped))
                if exits[-1].code == EXIT_RANK_LOST:  # the others have heard it by now, or hear nothing
                    short = min(LOST_GRACE_SECONDS, short)
                if exits[-1].code and not stopped:
                    wait = grace if exits[-1].code == EXIT_PREEMPTED else short
                    deadline = min(deadline, time.monotonic() + wait)
        if time.monotonic() >= deadline and not stopped:
            stopped, deadline = True, time.monotonic() + short
            for process in ranks.values():
                os.kill(process.pid, signal.SIGTERM)
        elif time.monotonic() >= deadline:
            deadline = float("inf")
            _kill(ranks.values())
    return exits


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a rank has ended; what is left of its group is then killed."""
    # While the dead leader is not reaped its pid cannot be given to anyone else: the group is surely ours.
    if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return False
    _kill([process])
    return True


def _kill(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _result(exits: Sequence[_Exit], nproc: int) -> int:
    codes = [e.code for e in exits]
    failed = [e for e in exits if e.code not in (0, EXIT_PREEMPTED)]
    for said in (EXIT_EXHAUSTED, EXIT_USER_ERROR, EXIT_DIVERGED, EXIT_RANK_LOST):  # a rank has said why
        if said in codes:
            return said
    if not failed:
        return EXIT_PREEMPTED if EXIT_PREEMPTED in codes else 0
    rank, code, stopped = failed[0]
    how = f"exited with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
    if stopped:
        how += " because it did not stop"
    elif code == -signal.SIGKILL:
        how += " (often: out of memory; see dmesg)"
    print(f"rank {rank} of {nproc} {how}", file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code
