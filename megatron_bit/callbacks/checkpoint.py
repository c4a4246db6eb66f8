"""When to save: every n steps, at the last step, and on a signal."""

from __future__ import annotations

import time

from megatron_bit.checkpoint.save import prune, save
from megatron_bit.parallel.agree import on_rank0
from megatron_bit.trainer import Callback, Trainer


class CheckpointCallback(Callback):
    """Saves, keeps the newest few, and marks a finished run."""

    def start(self, trainer: Trainer) -> None:
        self._mark(trainer)  # continued with nothing left to do
        if trainer.config.checkpoint.initial and trainer.state.step == 0:
            self._save(trainer)

    def after_step(self, trainer: Trainer) -> None:
        if trainer.stopping or trainer.state.step % trainer.config.checkpoint.every == 0:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.settle()
        state = trainer.state
        begin = time.perf_counter()
        root = trainer.run / "checkpoints"
        meta = {
            "state": state.to_json(),
            "updates": trainer.optimizer.updates,
            "identity": trainer.identity,
            "layout": str(trainer.groups.dims),
            "config": trainer.config.model_dump(mode="json"),
        }
        folder = save(root, state.step, meta, trainer.optimizer, trainer.groups)
        on_rank0(lambda: self._tidy(trainer, folder.name, time.perf_counter() - begin))

    @staticmethod
    def _tidy(trainer: Trainer, name: str, seconds: float) -> None:
        prune(trainer.run / "checkpoints", trainer.config.checkpoint.keep)
        print(f"saved {trainer.run / 'checkpoints' / name} in {seconds:.1f} s", flush=True)
        CheckpointCallback._mark(trainer)

    @staticmethod
    def _mark(trainer: Trainer) -> None:
        if trainer.groups.rank == 0 and trainer.state.step >= trainer.config.train.steps:
            (trainer.run / "FINISHED").touch()
