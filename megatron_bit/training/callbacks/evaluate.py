"""Validation: the likelihood bound on held-out samples, with its standard error."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_bit.config import Config
from megatron_bit.data.batches import BatchStream
from megatron_bit.errors import UserError
from megatron_bit.io.measured import json_of
from megatron_bit.model.chunk import TokenBatch
from megatron_bit.parallel.agree import on_rank0
from megatron_bit.parallel.ending import alone
from megatron_bit.run.log import last_step
from megatron_bit.training.step import pipeline
from megatron_bit.training.trainer import Callback, Trainer


class EvaluateCallback(Callback):
    """Before the first step (`evaluate.initial`), every `evaluate.every` steps, and at the last step of the run.

    A run that was asked to leave at such a step has no time for it: the next start makes up for it.
    """

    def start(self, trainer: Trainer) -> None:
        self._stream: BatchStream | None = None
        config, dims = trainer.config, trainer.groups.dims
        if not config.evaluate.every:
            return
        unit = config.train.micro_batch_size * dims.dp
        if dims.vpp > 1:
            unit *= dims.pp  # the interleaved schedule wants a multiple of pp micro-batches
        stream = BatchStream(
            trainer.corpus,
            "validation",
            seq_length=config.data.seq_length,
            seed=config.train.seed,
            global_batch_size=unit,
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=trainer.groups.dp_rank,
            dp_size=dims.dp,
            shuffle=False,
            prefetch=0,
            start_blocks=config.start_blocks,
        )
        self._count = min(config.evaluate.samples, stream.samples.before_repeat)
        if not self._count:
            raise UserError(
                "the validation split has no sample of every one of data.sources; prepare more data, or set "
                "evaluate.every=0"
            )
        self._rounds = -(-self._count // unit)
        self._stream = stream
        if self._due(trainer) and self._recorded(trainer) != trainer.state.step:
            self._report(trainer)

    def after_step(self, trainer: Trainer) -> None:
        leaving = trainer.preempted or trainer.diverged or trainer.orphaned
        if self._stream is not None and not leaving and self._due(trainer):
            self._report(trainer)

    @staticmethod
    def _recorded(trainer: Trainer) -> int | None:
        """Step of the last validation, as rank 0 knows it; those behind this start's begin were rolled back."""
        return on_rank0(lambda: last_step(trainer.run / "validation.jsonl"))

    @staticmethod
    def _due(trainer: Trainer) -> bool:
        step, config = trainer.state.step, trainer.config
        if step == 0:
            return config.evaluate.initial
        return step % config.evaluate.every == 0 or step >= config.train.steps

    def _report(self, trainer: Trainer) -> None:
        begin = time.perf_counter()
        mean, error, count, parts = self.bound(trainer)
        if trainer.groups.rank == 0:
            seconds = time.perf_counter() - begin
            print(
                f"validation at step {trainer.state.step}: {mean:.3f} +- {error:.3f} nats/token"
                f"{'' if trainer.config.exact else ' bound'} ({count} samples, {seconds:.1f} s)",
                flush=True,
            )
            record = {
                "step": trainer.state.step,
                "tokens": trainer.state.tokens,
                "nats_per_token_bound": mean,
                "standard_error": error,
                "samples": count,
                "nats_by_place": parts.sum(1).tolist(),
                "nats_by_group": parts.mean(0).tolist(),
            }
            state = trainer.state
            values = {"nats_per_token": mean, "standard_error": error}
            for kind in ("place", "group"):
                shares = record[f"nats_by_{kind}"]
                values |= {f"{kind}_{i}": share for i, share in enumerate(shares) if len(shares) > 1}
            trainer.trackers.scalars("validation", state.step, state.tokens, values)
            trainer.trackers.flush()
            path = trainer.run / "validation.jsonl"
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json_of(record) + "\n")
            except OSError as error:
                raise alone(UserError(f"{path} cannot be written: {error.strerror}")) from None

    def bound(self, trainer: Trainer) -> tuple[float, float, int, torch.Tensor]:
        """(mean, standard error over samples, samples) of the bound, the same on every rank and in every layout;
        and float64 [K, G], nats at each place of a block by group of bits: it is the mean over K of their sums over G.

        The last round goes on behind the samples that were asked for, so that every rank has as many micro-batches;
        those do not count.
        """
        assert self._stream is not None
        optimizer, groups = trainer.optimizer, trainer.groups
        parts = _parts(trainer.config)
        totals = torch.zeros(2 + math.prod(parts), dtype=torch.float64, device=groups.device)
        for chunk in optimizer.chunks:
            chunk.eval()
        try:
            with torch.no_grad():
                steps = self._stream.steps(0)
                for _ in range(self._rounds):
                    batches = [trainer.to_device(batch) for batch in next(steps)]
                    sums = self._sums(batches, trainer)
                    if sums is not None:  # else the bound is computed elsewhere
                        totals += sums
        except UserError as error:  # a damaged shard
            raise alone(error) from None
        finally:
            self._stream.close()
            for chunk in optimizer.chunks:
                chunk.train()
        dist.all_reduce(totals)
        squares, count, *shares = (totals / groups.dims.tp).tolist()
        table = torch.tensor(shares, dtype=torch.float64).view(parts) / count
        mean = table.sum(1).mean().item()
        variance = max(0.0, squares / count - mean * mean)
        return mean, math.sqrt(variance / max(1.0, count - 1)), round(count), table

    def _sums(self, batches: Sequence[TokenBatch], trainer: Trainer) -> torch.Tensor | None:
        """float64 [2 + K G]: sum of squares and count of this rank's samples, and the sums of their parts; None where
        the bound is not computed."""
        optimizer = trainer.optimizer
        if optimizer.managed:
            outputs = [optimizer.forward(batch)[1] for batch in batches]
        else:
            outputs = pipeline(batches, optimizer.chunks, trainer.groups, forward_only=True)
        if not outputs:
            return None
        counts = torch.cat([batch.sample for batch in batches]) < self._count
        bounds = torch.cat(list(outputs)).double().where(counts[:, None, None], 0.0)
        squares = bounds.sum(-1).mean(-1).square().sum()
        return torch.cat((torch.stack((squares, counts.sum().double())), bounds.sum(0).flatten()))


def _parts(config: Config) -> tuple[int, int]:
    """Places of a block and groups of bits that a bound has parts of."""
    m = config.model
    return (1, 1) if m.head.kind == "softmax" else (m.block_size, len(m.group_sizes))
