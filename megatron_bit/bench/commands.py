"""`megatron-bit` called by a benchmark, in processes of its own, for a limited time."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_bit.bench.machine import cores
from megatron_bit.errors import EXIT_PREEMPTED, UserError


class Paused(Exception):
    """The time is over, and what was running has saved."""


class Commands:
    """`megatron-bit` in processes that share the cores, until a moment at which they are asked to save and leave."""

    def __init__(self, jobs: int, minutes: float | None) -> None:
        threads = str(max(1, cores() // jobs))
        self.environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONSAFEPATH": "1"}
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.running: set[subprocess.Popen[str]] = set()

    @contextlib.contextmanager
    def until_told(self) -> Iterator[None]:
        """SIGTERM is that moment, too."""

        def stop(*_: object) -> None:
            self.end = 0.0
            for process in [*self.running]:
                process.terminate()

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def __call__(self, words: Sequence[str], run: Path) -> str:
        """stdout. Paused when the time is over; UserError, which names the run, for any other end than a good one."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise Paused
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_bit", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment,
        )  # fmt: skip
        self.running.add(process)
        if time.monotonic() >= self.end:  # told while it was started
            process.terminate()
        try:
            out, err = process.communicate(timeout=None if left == math.inf else left)
        except subprocess.TimeoutExpired:
            process.terminate()
            out, err = process.communicate()
        finally:
            self.running.discard(process)
        if process.returncode in (EXIT_PREEMPTED, -signal.SIGTERM) and time.monotonic() >= self.end:
            raise Paused
        if process.returncode:
            tail = (err.strip() or out.strip()).splitlines()[-1:]
            raise UserError(f"bench quality: {run.name} ended with {process.returncode}: {' '.join(tail)}")
        return out
