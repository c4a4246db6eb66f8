"""`log.to`: the trackers of a run, opened on rank 0, and what happens when one of them fails."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping

from megatron_bit.config import LogConfig
from megatron_bit.errors import UserError
from megatron_bit.training.trackers.mlflow import Mlflow
from megatron_bit.training.trackers.tensorboard import Tensorboard
from megatron_bit.training.trackers.tracker import About, Background, Tracker
from megatron_bit.training.trackers.wandb import Wandb

_REMOTE: dict[str, Callable[[About], Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}


class Trackers:
    """All of them as one. Rank 0 has them; on the others nothing is opened."""

    def __init__(self) -> None:
        self._open: dict[str, Tracker] = {}

    def open(self, config: LogConfig, about: About) -> None:
        """Rank 0 calls it, before the first step.

        Raises:
            UserError: a package is missing.
            OSError: tensorboard's folder cannot be written.
        """
        for name in config.to:
            if importlib.util.find_spec(name) is None:
                raise UserError(
                    f"log.to names {name}, which is not installed: pip install 'megatron-bit[{name}]', or leave it out"
                )
        for name in config.to:
            if name == "tensorboard":
                self._open[name] = Tensorboard(about)
            else:
                self._open[name] = Background(name, functools.partial(_REMOTE[name], about))

    def scalars(self, group: str, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Values of one step, to all of them; see `Tracker.scalars`."""
        self._each(lambda tracker: tracker.scalars(group, step, tokens, values))

    def flush(self) -> None:
        """What was given is on its way, and known to have been."""
        self._each(lambda tracker: tracker.flush())

    def close(self, finished: bool) -> None:
        """Waits for what is to be sent, at most half a minute for each."""
        self._each(lambda tracker: tracker.close(finished))
        self._open = {}

    def _each(self, call: Callable[[Tracker], None]) -> None:
        """A tracker that fails is said once, and the run goes on without it."""
        for name, tracker in list(self._open.items()):
            why = ""
            try:
                call(tracker)
            except OSError as error:  # tensorboard's writing thread, some time after
                why = error.strerror or str(error)
            why = why or getattr(tracker, "problem", "")
            if why:
                del self._open[name]
                print(f"warning: {name} cannot be written: {why}; going on without", flush=True)
