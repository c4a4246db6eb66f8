"""N ranks of one command on this machine: what torchrun does for one node, without torch in the parent.

Linux only. Call it from the main thread of a process that has no other threads: signals are taken with
`sigtimedwait`, and a thread that does not block them would be handed them instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from megatron_bit.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, UserError

# -P: the working folder stays off sys.path, or `import kernels` would find the folder of a checkout.
COMMAND = (sys.executable, "-P", "-m", "megatron_bit")
SHORT_GRACE_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
# What the ranks get for what the parent gets. A lost terminal is a reason to save, too.
_FORWARD = {
    signal.SIGINT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
}


class Exit(NamedTuple):
    """How one rank ended."""

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

    `env` replaces os.environ as the ranks' environment; RANK, WORLD_SIZE and the like are added to it. After a
    rank ends with code 85 (saved on a signal) the others have `grace_seconds` to end as well, after any other
    failure at most 10 s; then they get SIGTERM and, as long again but at most 10 s later, SIGKILL.

    Returns 0 if all ranks did; 2 if one exited with 2; else the code of the first rank that failed (128 + signal
    if one killed it); else 85 if one exited with 85. Raises UserError for a bad `nproc` or `port`.
    """
    if nproc < 1:
        raise UserError(f"nproc = {nproc} has to be at least 1: the number of processes to start on this machine")
    ranks_env = _environment(os.environ if env is None else env, nproc, choose_port(port))
    # Blocked, so that none is lost while ranks start, and none runs a handler of the caller; under nohup SIGHUP
    # is ignored and stays so (a blocked signal is queued even if it is ignored).
    watched = {s for s in _FORWARD if signal.getsignal(s) is not signal.SIG_IGN} | {signal.SIGCHLD}
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    ranks: dict[int, int] = {}  # rank -> pid, of those that run
    try:
        in_child = _child_setup(os.getpid(), previous)
        sys.stdout.flush()
        for rank in range(nproc):
            own = {**ranks_env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks[rank] = _spawn([*command, *args], own, in_child)
        exits = _watch(ranks, watched, grace_seconds)
    finally:
        _kill(ranks)  # only after an exception, such as a command that does not exist
        while signal.sigtimedwait(watched, 0):  # a late Ctrl-C must not become the caller's KeyboardInterrupt
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    return _result(exits, nproc)


def choose_port(port: int | None = None) -> int:
    """A free TCP port, or `port` if it is free on all interfaces, as rank 0 wants it; else UserError."""
    if port is not None and not 0 < port < 65536:
        raise UserError(f"port {port} is not a TCP port; choose 1024 to 65535, or leave it out to get a free one")
    for family in (socket.AF_INET6, socket.AF_INET):
        dual = family is socket.AF_INET6
        try:
            with socket.create_server(("", port or 0), family=family, dualstack_ipv6=dual) as server:
                return server.getsockname()[1]
        except (OSError, ValueError) as error:
            code = error.errno if isinstance(error, OSError) else None
            if dual and code not in (errno.EADDRINUSE, errno.EACCES):
                continue  # no IPv6 here
            reason = "is taken by another process" if code == errno.EADDRINUSE else f"cannot be used ({error})"
            raise UserError(f"port {port} {reason}; choose another, or leave it out to get a free one") from None
    raise AssertionError("the last family either returns or raises")


def _environment(base: Mapping[str, str], nproc: int, port: int) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0))
    defaults = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": str(max(1, cores // nproc))}
    world = {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
    return {**defaults, **base, **world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _child_setup(parent: int, mask: set[signal.Signals | int]) -> Callable[[], None]:
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up here: after the fork only plain calls are safe

    def setup() -> None:
        # The kernel kills this process when the parent dies, even by SIGKILL, which no handler sees. It survives
        # exec, not fork: helpers of a rank are the rank's to end. If the parent died before the call, stop here.
        if prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) or os.getppid() != parent:
            os._exit(1)
        for number in _FORWARD:  # drops a Ctrl-C that came between fork and setsid; the parent forwards it
            signal.signal(number, signal.SIG_IGN)
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    return setup


def _spawn(command: Sequence[str], env: Mapping[str, str], setup: Callable[[], None]) -> int:
    # Its own session: the terminal's Ctrl-C reaches the parent alone, and the group can be killed as a whole.
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=setup
    )
    process.returncode = 0  # reaped by pid in _reap; without this Popen's own clean-up would race for it
    return process.pid


def _watch(ranks: dict[int, int], watched: set[signal.Signals], grace_seconds: float) -> list[Exit]:
    """Wait until all have ended, in the order in which they end; takes each out of `ranks`."""
    short = min(SHORT_GRACE_SECONDS, grace_seconds)
    exits: list[Exit] = []
    sent: set[signal.Signals] = set()
    interrupts = 0
    deadline, stopped = float("inf"), False
    while ranks:
        received = signal.sigtimedwait(watched, max(0.0, min(deadline - time.monotonic(), 60.0)))
        number = signal.Signals(received.si_signo) if received else None
        if number is signal.SIGINT:
            interrupts += 1
            if interrupts == 1:
                print("Ctrl-C: the ranks save and stop; again kills them at once", file=sys.stderr, flush=True)
            else:
                stopped = True
                _kill(ranks, reap=False)
        if number in _FORWARD and _FORWARD[number] not in sent:
            sent.add(_FORWARD[number])
            _send(ranks, _FORWARD[number])
        for rank in list(ranks):
            code = _reap(ranks[rank])
            if code is None:
                continue
            del ranks[rank]
            exits.append(Exit(rank, code, stopped))
            if code and not stopped:
                grace = grace_seconds if code == EXIT_PREEMPTED else short
                deadline = min(deadline, time.monotonic() + grace)
        if time.monotonic() >= deadline:
            if stopped:
                _kill(ranks, reap=False)
                deadline = float("inf")
            else:
                stopped, deadline = True, time.monotonic() + short
                _send(ranks, signal.SIGTERM)
    return exits


def _send(ranks: Mapping[int, int], number: signal.Signals) -> None:
    for pid in ranks.values():  # the rank alone, not its helpers: it ends them itself. Not reaped, so still its pid
        os.kill(pid, number)


def _kill(ranks: dict[int, int], reap: bool = True) -> None:
    for pid in ranks.values():
        os.killpg(pid, signal.SIGKILL)
    for pid in ranks.values() if reap else ():
        os.waitpid(pid, 0)


def _reap(pid: int) -> int | None:
    """Exit code (minus the signal) of a rank that has ended, whose group is then cleared; None while it runs."""
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return None
    # While the dead leader is not reaped its pid cannot be given to anyone else: the group is surely ours.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _result(exits: Sequence[Exit], nproc: int) -> int:
    codes = [e.code for e in exits]
    failed = [e for e in exits if e.code not in (0, EXIT_PREEMPTED)]
    if EXIT_USER_ERROR in codes:
        return EXIT_USER_ERROR
    if not failed:
        return EXIT_PREEMPTED if EXIT_PREEMPTED in codes else 0
    first = failed[0]
    return 128 - first.code if first.code < 0 else first.code
