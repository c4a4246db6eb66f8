"""Tensorboard: event files in RUN/tensorboard, with tokens on the x axis."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import yaml

from megatron_bit.training.trackers.tracker import About


class Tensorboard:
    """What a start before has shown of steps that are done again is taken back, as in log.jsonl."""

    def __init__(self, about: About) -> None:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _excepthook
        self._writer = SummaryWriter(str(about.folder / "tensorboard"), purge_step=about.tokens + 1)
        text = yaml.safe_dump(dict(about.config), sort_keys=False)
        self._writer.add_text("configuration", "".join(f"    {line}\n" for line in text.splitlines()), about.tokens)

    def scalars(self, group: str, step: int, tokens: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(f"{group}/{key}", value, tokens)

    def flush(self) -> None:
        """It keeps them for two minutes, and a killed run has its saved steps behind it."""
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


def _excepthook(args: threading.ExceptHookArgs) -> None:
    """What ends tensorboard's writing thread is raised once more where we write or flush, and is said there."""
    if type(args.thread).__module__.split(".")[0] != "tensorboard":
        threading.__excepthook__(args)
