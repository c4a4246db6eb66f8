"""SLURM's controller away for a while: what counts as no answer, and how long a command of ours asks again.

A call of SLURM has three ends: an answer, a refusal ("Invalid job id"), and silence. Silence says nothing: neither that
a job is gone, nor that what was asked for has not been done. The job's script tells them apart by the same words
(render.py puts `WORDS` into it), and asks for as long as it lives.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from megatron_bit.errors import UserError

VARIABLE = "MBIT_SLURM_PATIENCE"
PATIENCE_SECONDS = 60.0  # then whoever sits before the terminal decides
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 15.0

# As an extended regular expression, for Python and for grep -E -i. SLURM 22.05 stopped and killed says the first three;
# scontrol says "Unexpected message received" where the others say "timed out".
WORDS = "|".join(
    (
        "timed out",
        "unable to contact slurm",
        "unexpected message received",
        "zero bytes were transmitted",
        r"(connection|connect|send|receive|shutdown) failure",
        "connection (refused|reset)",
        "network is unreachable",
        "no route to host",
        "broken pipe",
        "temporary failure in name resolution",
        "in standby",  # the backup controller, before it takes over
        "temporarily (unable|unavailable|disabled)",
        "try again later",
        "munge encode failed",  # munged of this machine is being restarted
        "protocol authentication error",  # that of the controller's
    )
)
_SILENT = re.compile(WORDS, re.IGNORECASE)
_T = TypeVar("_T")


class Silent(UserError):
    """SLURM has not answered; `what` says which command and how that shows, `advice` what to do."""

    def __init__(self, what: str, advice: str = "the controller may be down (`scontrol ping`); try later") -> None:
        super().__init__(f"{what}: {advice}")
        self.what, self.advice = what, advice


def silent(text: str) -> bool:
    """Whether a command of SLURM that failed with these words has had no answer."""
    return _SILENT.search(text) is not None


class Patience:
    """How long a command of ours waits for SLURM, all its questions together."""

    def __init__(self) -> None:
        """UserError if the environment variable is no number."""
        text = os.environ.get(VARIABLE, "")
        try:
            self.seconds = float(text) if text else PATIENCE_SECONDS
        except ValueError:
            self.seconds = -1.0
        if not 0 <= self.seconds < float("inf"):
            raise UserError(f"{VARIABLE} = {text!r} has to be a number of seconds, 0 or more")
        self._deadline: float | None = None  # counts from the first silence
        self._pause = FIRST_PAUSE_SECONDS

    def ask(self, question: Callable[[], _T]) -> _T:
        """The answer to `question`, which may be asked many times. Raises Silent when patience is over."""
        while True:
            try:
                return question()
            except Silent as silence:
                self.wait(silence)

    def begin(self, silence: Silent) -> None:
        """The first silence says that it is waited for, and how long."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self.seconds
            if self.seconds:
                print(f"{silence.what}: asking again for up to {self.seconds:g} s", file=sys.stderr, flush=True)

    def wait(self, silence: Silent) -> None:
        """Pause before the next question. Raises `silence` when patience is over."""
        self.begin(silence)
        left = (self._deadline or 0.0) - time.monotonic()
        if left <= 0:
            raise silence
        time.sleep(min(self._pause, left))
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
