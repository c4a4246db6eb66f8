"""A file for each rank that says how far it is: the launcher's watchdog and `status` read them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time

from megatron_bit.training.trainer import Callback, Trainer

BYTES = 256


class HeartbeatCallback(Callback):
    """Overwrites RUN/heartbeats/rank-00000 after every step: one `pwrite` of 256 bytes, a few microseconds.

    Never a reason to end a run: where the file cannot be written, the rank goes without.
    """

    def start(self, trainer: Trainer) -> None:
        self._descriptor: int | None = None
        self._first = trainer.state.step
        self._known = {
            "rank": trainer.groups.rank,
            "host": socket.gethostname(),
            "attempt": os.environ.get("MBIT_ATTEMPT", ""),
        }
        folder = trainer.run / "heartbeats"
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
            path = folder / f"rank-{trainer.groups.rank:05d}"
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self._beat(trainer)

    def after_step(self, trainer: Trainer) -> None:
        self._beat(trainer)

    def finish(self, trainer: Trainer) -> None:
        self._beat(trainer, ended=True)
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _beat(self, trainer: Trainer, ended: bool = False) -> None:
        step = trainer.state.step
        record = {**self._known, "step": step, "done": step - self._first, "time": time.time(), "ended": ended}
        # of one length, so that nothing of the line before is left; not cut: a reader would see an empty file
        line = json.dumps(record).encode().ljust(BYTES - 1) + b"\n"
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._descriptor, line, 0)
