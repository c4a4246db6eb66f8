"""Weights & Biases. Project, entity and mode are the user's environment: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_bit.training.trackers.tracker import About, Sent


class Wandb:
    """One run there for all starts of a run here, under the run's own id."""

    def __init__(self, about: About) -> None:
        import wandb

        self._sent = Sent(about.folder, "wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "megatron_bit"),
            id=self._sent.id or about.id,
            name=about.folder.name,
            resume="allow",
            dir=str(about.folder),
            config=dict(about.config),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._sent.named(self._run.id)
        self._run.define_metric("tokens")
        for group in ("train", "validation"):
            self._run.define_metric(f"{group}/*", step_metric="tokens")

    def scalars(self, group: str, step: int, tokens: int, values: Mapping[str, float]) -> None:
        if not self._sent.is_new(group, step):
            return
        self._run.log({"step": step, "tokens": tokens, **{f"{group}/{key}": value for key, value in values.items()}})

    def flush(self) -> None:
        self._sent.flush()

    def close(self, finished: bool) -> None:
        self._sent.flush()
        self._run.finish(exit_code=0)
