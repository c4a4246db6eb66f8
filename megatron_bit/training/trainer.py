"""The training loop, and nothing but the loop; what happens around a step is in callbacks/."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bit.checkpoint.mirror import Mirror
from megatron_bit.checkpoint.writer import Votes
from megatron_bit.config import Config
from megatron_bit.data.batches import Batch, BatchStream
from megatron_bit.data.corpus import Corpus
from megatron_bit.errors import ShardError, UserError
from megatron_bit.model.chunk import TokenBatch, noise_tables
from megatron_bit.optim.guard import accept
from megatron_bit.optim.optimizer import Optimizer
from megatron_bit.optim.schedule import learning_rate
from megatron_bit.parallel.ending import alone, leaving
from megatron_bit.parallel.groups import Groups
from megatron_bit.run.lock import RunLock
from megatron_bit.run.state import TrainState
from megatron_bit.training.step import forward_backward
from megatron_bit.training.trackers.build import Trackers


@dataclass
class StepRecord:
    """What a step leaves behind. Tensors stay on the device; reading them waits for the step."""

    step: int
    tokens: int
    lr: float
    grad_norm: Tensor | float
    skipped: Tensor | bool
    replaced: int  # samples of the run so far that were not their own shard's, which was damaged
    totals: Tensor  # float32 [5]: loss, bound, ranks that were asked to stop, Votes; summed over all ranks


class Callback:
    """Something that happens around steps, on every rank alike."""

    def start(self, trainer: Trainer) -> None:
        """Before the first step."""

    def after_step(self, trainer: Trainer) -> None:
        """After every step; `trainer.record` is its record."""

    def finish(self, trainer: Trainer) -> None:
        """After the last step, and after an exception, if `start` succeeded."""


class Trainer:
    """Holds the parts of a run. State that outlives a step is in `state` (saved) and `record` (not saved)."""

    def __init__(
        self,
        config: Config,
        groups: Groups,
        corpus: Corpus,
        optimizer: Optimizer,
        state: TrainState,
        callbacks: Sequence[Callback],
        identity: dict[str, Any],
        lock: RunLock,
        mirror: Mirror | None,
    ) -> None:
        self.config = config
        self.groups = groups
        self.corpus = corpus
        self.optimizer = optimizer
        self.state = state
        self.callbacks = callbacks
        self.identity = identity
        self.lock = lock  # held as long as the trainer lives
        self.mirror = mirror  # opened on rank 0
        self.trackers = Trackers()  # opened on rank 0
        self.record: StepRecord | None = None
        self._settled = True
        self.asked_to_stop = False  # this rank got a signal
        self.in_row = 0  # updates skipped, or losses that were no numbers, up to the last settled step
        self.diverged = False  # more of them than optim.max_skipped allows
        self.left = ""  # where an orphan's state was saved
        self.orphaned = False  # all ranks know that the run folder is not this job's any more
        self.preempted = False  # all ranks know that one of them did, one step after its all-reduce
        self.votes = Votes()  # what this rank says of a save in flight
        self.heard: tuple[int, Votes] = (0, Votes())  # (step, sums over all ranks), one step after its all-reduce
        self.stream = BatchStream(
            corpus,
            "train",
            seq_length=config.data.seq_length,
            seed=config.train.seed,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=groups.dp_rank,
            dp_size=groups.dims.dp,
            shuffle_shards=config.data.shuffle_shards,
            prefetch=config.data.prefetch,
            start_blocks=config.start_blocks,
        )

    @property
    def run(self) -> Path:
        return Path(self.config.run)

    @property
    def last_step(self) -> int:
        """The step at which this start of the run ends by itself."""
        return min(self.config.train.steps, self.config.train.stop_at or self.config.train.steps)

    @property
    def stopping(self) -> bool:
        """Whether the step just done is the last; the same on every rank."""
        return self.preempted or self.diverged or self.orphaned or self.state.step >= self.last_step

    def fit(self) -> None:
        """Train from `state` to the last step, or until a signal."""
        with contextlib.ExitStack() as started:
            started.callback(self.stream.close)
            try:
                self._loop(started)
            except Exception as error:
                other = leaving(error)  # before the callbacks finish, which may take a while
                if other is error:
                    raise
                raise other from None

    def _loop(self, started: contextlib.ExitStack) -> None:
        for callback in self.callbacks:
            callback.start(self)
            started.callback(callback.finish, self)
        if self.stopping:
            if self.groups.rank == 0:
                print(self._nothing_left(), flush=True)
            return
        for batches in self._batches():
            self.train_step(batches)
            for callback in self.callbacks:
                callback.after_step(self)
            if self.stopping:
                return

    def _nothing_left(self) -> str:
        step, train = self.state.step, self.config.train
        if step >= train.steps:
            return f"nothing left to do: step {step} of train.steps {train.steps}"
        return f"nothing left to do: step {step}, train.stop_at {train.stop_at}; train.stop_at=null goes on"

    def _batches(self) -> Iterator[list[Batch]]:
        try:
            if self.config.data.on_error == "stop":
                yield from self.stream.steps(self.state.samples)
            else:
                yield from self._undamaged()
        except UserError as error:  # a damaged shard: the others may not know, and end with this rank
            raise alone(error) from None

    def _undamaged(self) -> Iterator[list[Batch]]:
        """Batches without the damaged shards, which all ranks agree on before a window of them is used."""
        state = self.state
        while True:
            for step in self.stream.checked_steps(state.samples, state.damaged):
                if step.checked and self._agree_on_damage(step.problems):
                    break  # from this very step on, again
                state.replaced += self.stream.samples.replaced(
                    np.arange(state.samples, state.samples + self.config.train.global_batch_size),
                    frozenset(state.damaged),
                )
                yield step.batches

    def _agree_on_damage(self, problems: list[ShardError]) -> bool:
        """Whether any rank has found a shard damaged; `state.damaged` then has it on all of them. A collective."""
        found: list[list[tuple[str, str]]] = [[]] * dist.get_world_size()
        dist.all_gather_object(found, [(problem.sha256, str(problem)) for problem in problems])
        news = {sha256: (rank, text) for rank, said in enumerate(found) for sha256, text in said}
        for sha256, (rank, text) in news.items():
            self.state.damaged.append(sha256)
            if self.groups.rank == 0:
                print(f"{text}; its samples are replaced from here on (data.on_error=skip; rank {rank})", flush=True)
        too_many = self.stream.samples.too_many(frozenset(self.state.damaged))
        if too_many is not None:
            raise UserError(
                f"{too_many} are damaged, which data.on_error=skip does not cover; look at disk and network"
            )
        return bool(news)

    def train_step(self, batches: list[Batch]) -> None:
        """One global batch: forward and backward of this rank's micro-batches, then one update."""
        config, state = self.config, self.state
        metrics = forward_backward([self.to_device(batch) for batch in batches], self.optimizer, self.groups)
        flags = metrics.new_tensor((float(self.asked_to_stop), *self.votes))
        totals = torch.cat((metrics[:2], flags, metrics[2:]))
        dist.all_reduce(totals)
        totals, histogram = totals[: 2 + len(flags)], totals[2 + len(flags) :]
        for table in noise_tables(self.optimizer.chunks):
            table.update(histogram)
        lr = learning_rate(config, state.step)
        if config.optim.spike_guard and not accept(totals[0].item(), state, config.optim.spike_guard):
            self.optimizer.poison()
        self.optimizer.step([lr * group["lr_scale"] for group in self.optimizer.base.param_groups])
        if self.record is not None:  # the step before: its values are there without waiting
            stop, *votes = self.settle()[2:]
            self.preempted, self.heard = stop > 0, (self.record.step, Votes(*votes))
        state.step += 1
        state.samples += config.train.global_batch_size
        state.tokens += config.train.global_batch_size * config.data.seq_length
        optimizer = self.optimizer
        self.record = StepRecord(
            state.step, state.tokens, lr, optimizer.grad_norm, optimizer.skipped, state.replaced, totals
        )
        self._settled = False

    def settle(self) -> list[float]:
        """Count the last step if it was skipped, which waits for it; returns its totals. Call before `state` is saved
        or shown, on every rank at the same step: all draw the same conclusions from the same numbers."""
        assert self.record is not None
        totals: list[float] = self.record.totals.tolist()
        if not self._settled:
            self._settled = True
            skipped = bool(self.record.skipped)
            self.state.skipped += skipped
            if skipped or not math.isfinite(totals[0]):
                self.in_row += 1
            else:  # its loss is of the weights behind the step before
                self.in_row, self.state.good = 0, self.record.step - 1
            limit = self.config.optim.max_skipped
            self.diverged = bool(limit) and self.in_row >= limit
        return totals

    def begin_again(self, state: TrainState) -> None:
        """Go on from weights that were loaded over those that diverged."""
        self.state, self.record, self._settled = state, None, True
        self.in_row, self.diverged = 0, False

    def to_device(self, batch: Batch) -> TokenBatch:
        """numpy to this rank's device, without waiting for the copy."""

        def moved(array: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(array)
            if self.groups.device.type == "cuda":
                tensor = tensor.pin_memory()
            return tensor.to(self.groups.device, non_blocking=True)

        start = None if batch.start is None else moved(batch.start)
        return TokenBatch(moved(batch.tokens), moved(batch.sample), start)
