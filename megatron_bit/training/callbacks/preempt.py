"""Signals: save and leave. SLURM sends USR1 (or TERM) before it takes the nodes; a person presses Ctrl-C, or loses the
terminal (HUP)."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from megatron_bit.training.trainer import Callback, Trainer

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class PreemptCallback(Callback):
    """Sets a flag that goes into the next step's all-reduce, so that all ranks stop at the same step."""

    def start(self, trainer: Trainer) -> None:
        def ask(number: int, frame: FrameType | None) -> None:
            trainer.asked_to_stop = True
            if number == signal.SIGINT:  # a second Ctrl-C does not wait
                signal.signal(signal.SIGINT, signal.default_int_handler)

        # an ignored SIGHUP stays so, under nohup; the others are for the ranks, whatever a script of a job ignores
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        heard = [number for number in SIGNALS if not (nohup and number == signal.SIGHUP)]
        self._before: dict[int, Any] = {number: signal.signal(number, ask) for number in heard}

    def finish(self, trainer: Trainer) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
