"""When to save: every n steps, at the last step, and on a signal."""

from __future__ import annotations

import json
import os
from pathlib import Path

from megatron_bit.checkpoint.mirror import Mirror
from megatron_bit.checkpoint.writer import CheckpointWriter
from megatron_bit.config import to_yaml
from megatron_bit.errors import UserError
from megatron_bit.io.files import write_atomic
from megatron_bit.model.chunk import noise_tables
from megatron_bit.parallel.agree import on_rank0
from megatron_bit.training.trainer import Callback, Trainer


class CheckpointCallback(Callback):
    """Saves in the background, and marks a finished run; the last save of a start is waited for."""

    def __init__(self, mirror: Mirror | None) -> None:
        """mirror: opened on rank 0, if the configuration names one."""
        self._mirror = mirror

    def start(self, trainer: Trainer) -> None:
        self._open(trainer, trainer.run)
        if trainer.stopping:  # continued with nothing left to do: what the start before had no time for
            self._writer.finish()
            self._mark(trainer)
        if trainer.config.checkpoint.initial and trainer.state.step == 0:
            self._save(trainer)

    def _open(self, trainer: Trainer, run: Path) -> None:
        c = trainer.config.checkpoint
        patience = 0.9 * 60 * trainer.config.parallel.timeout_minutes  # the others wait for us in a collective
        root = run / "checkpoints"
        self._due = False
        self._writer = CheckpointWriter(root, c.keep, c.keep_every, patience, trainer.groups, self._mirror)

    def after_step(self, trainer: Trainer) -> None:
        if trainer.orphaned:
            self._save_beside(trainer)
            return
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

    def finish(self, trainer: Trainer) -> None:
        self._writer.leave()  # whatever ends the run, a save that is under way may end well

    def _save_beside(self, trainer: Trainer) -> None:
        """The run folder is another's or gone: nothing is written there any more, and the state goes beside it."""
        writer, state = self._writer, trainer.state.step
        if writer.step is not None:
            writer.forget()
        beside = on_rank0(lambda: save_place(trainer))
        self._mirror = None
        self._open(trainer, beside)
        self._save(trainer)
        self._writer.wait(required=True)
        trainer.left = (
            f"its state of step {state} is saved in {beside}, a run that `megatron-bit train {beside}` continues"
        )

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
        """One that was asked to leave at its last step was not validated there, and its copy not waited for."""
        left = trainer.preempted or trainer.diverged or trainer.orphaned
        ended = trainer.state.step >= trainer.config.train.steps and not left
        if trainer.groups.rank == 0 and ended:
            (trainer.run / "FINISHED").touch()


def save_place(trainer: Trainer) -> Path:
    """A run folder beside the one that was lost, with its configuration; UserError if it cannot be made."""
    run = trainer.run.absolute()
    beside = run.with_name(f"{run.name}.left-{os.getpid()}")
    try:
        (beside / "checkpoints").mkdir(parents=True)
        config = trainer.config.model_copy(update={"run": str(beside)})
        write_atomic(beside / "identity.json", json.dumps(trainer.identity, indent=1).encode())
        write_atomic(beside / "config.yaml", to_yaml(config).encode())
    except OSError as error:
        raise UserError(f"{trainer.lock.lost()}, and {beside} cannot be made: {error.strerror}") from None
    return beside
