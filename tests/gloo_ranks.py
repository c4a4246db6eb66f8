"""Run a function on N real processes over gloo, for tests.

A fork server imports torch, megatron-core and DeepSpeed once; a rank is a fork of it, so that a job of 8 ranks
costs a fork and a group rather than 8 imports.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

from mbit_launcher.local import choose_port

_context: Any = None


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Call `function(*args)` on every rank of a new job; returns the results by rank.

    `function` lives in a helper module (tests/*.py), not in a test file, whose module a rank cannot import.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or if the job takes longer than `timeout`
            seconds; no process is left behind.
    """
    context = fork_server()
    port = choose_port()
    queue = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(queue, function, rank, world_size, port, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(results) < world_size:
            try:
                rank, ok, value = queue.get(timeout=1.0)
            except Empty:
                lost = [r for r, p in enumerate(ranks) if p.exitcode is not None and r not in results]
                assert not lost, f"ranks {lost} of {world_size} died without a result"
                assert time.monotonic() < deadline, f"ranks {sorted(results)} of {world_size} ended in {timeout} s"
                continue
            assert ok, f"rank {rank} of {world_size} failed:\n{value}"
            results[rank] = value
    finally:
        deadline = time.monotonic() + (10 if len(results) == world_size else 1)  # a launcher ends the others soon
        for process in ranks:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


def end_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0, enough: int | None = None
) -> tuple[list[int | None], float]:
    """The same for ranks that end their process themselves: exit codes by rank (None: killed after `timeout`, or when
    `enough` of them have ended), and the seconds from the first one's end to the last one's."""
    port = choose_port()
    ranks = [
        fork_server().Process(target=_enter, args=(function, rank, world_size, port, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    begin, first = time.monotonic(), 0.0
    while (ended := sum(process.exitcode is not None for process in ranks)) < (enough or world_size):
        if time.monotonic() > begin + timeout:
            break
        if not first and ended:
            first = time.monotonic()
        time.sleep(0.02)
    seconds = time.monotonic() - first if first else 0.0
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    return codes, seconds


def fork_server() -> Any:
    global _context
    if _context is None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the server and its ranks inherit it
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as `train` does
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # Python 3.11's fork server does not take over sys.path, and ignores what it cannot import
        here = str(Path(__file__).parent)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(["preload_ranks"])
    return _context


def _rank(queue: Any, function: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple) -> None:
    _join(rank, world_size, port)
    try:
        queue.put((rank, True, function(*args)))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
    queue.close()
    queue.join_thread()


def _enter(function: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple) -> None:
    _join(rank, world_size, port)
    function(*args)


def _join(rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
