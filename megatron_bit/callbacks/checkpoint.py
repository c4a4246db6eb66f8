"""When to save: every n steps, at the last step, and on a signal."""

from __future__ import annotations

from megatron_bit.checkpoint.mirror import Mirror
from megatron_bit.checkpoint.writer import CheckpointWriter
from megatron_bit.model.chunk import noise_tables
from megatron_bit.trainer import Callback, Trainer


class CheckpointCallback(Callback):
    """Saves in the background, and marks a finished run; the last save of a start is waited for."""

    def __init__(self, mirror: Mirror | None) -> None:
        """mirror: opened on rank 0, if the configuration names one."""
        self._mirror = mirror

    def start(self, trainer: Trainer) -> None:
        c = trainer.config.checkpoint
        patience = 0.9 * 60 * trainer.config.parallel.timeout_minutes  # the others wait for us in a collective
        root = trainer.run / "checkpoints"
        self._due = False
        self._writer = CheckpointWriter(root, c.keep, c.keep_every, patience, trainer.groups, self._mirror)
        self._mark(trainer)  # continued with nothing left to do
        if c.initial and trainer.state.step == 0:
            self._save(trainer)

    def after_step(self, trainer: Trainer) -> None:
        writer, step = self._writer, trainer.state.step
        heard, votes = trainer.heard
        if writer.step is not None and heard > writer.step:  # what was said before the save began is not about it
            writer.poll(votes)
        self._due = self._due or step % trainer.config.checkpoint.every == 0
        if self._due:
            trainer.settle()  # what is saved has to be worth it: not while updates are skipped
        if (trainer.stopping and not trainer.diverged) or (self._due and not trainer.in_row):
            self._due = False
            self._save(trainer)
        if trainer.stopping:
            writer.wait(required=not trainer.diverged)
            if not trainer.preempted:  # no time for that; the next start catches up
                writer.finish()
            self._mark(trainer)
        writer.tell()
        trainer.votes = writer.votes

    def _save(self, trainer: Trainer) -> None:
        if trainer.record is not None:
            trainer.settle()
        self._writer.good = trainer.state.good
        meta = {
            "state": trainer.state.to_json(),
            "updates": trainer.optimizer.updates,
            "identity": trainer.identity,
            "layout": str(trainer.groups.dims),
            "config": trainer.config.model_dump(mode="json"),
        }
        for table in noise_tables(trainer.optimizer.chunks):  # all chunks have the same
            meta["noise_table"] = table.to_json()
        self._writer.start(trainer.state.step, meta, trainer.optimizer)
        if not trainer.config.checkpoint.background:
            self._writer.wait()

    @staticmethod
    def _mark(trainer: Trainer) -> None:
        if trainer.groups.rank == 0 and trainer.state.step >= trainer.config.train.steps and not trainer.diverged:
            (trainer.run / "FINISHED").touch()
