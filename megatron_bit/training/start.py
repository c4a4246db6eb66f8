"""Where a start begins: at the newest checkpoint of its run, with the weights of another one, or anew."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_bit.checkpoint.init_from import Weights, fill, open_weights
from megatron_bit.checkpoint.load import load_noise_table, load_optimizer, load_scaling, newest_undamaged
from megatron_bit.checkpoint.mirror import Mirror
from megatron_bit.config import Config
from megatron_bit.optim.optimizer import Optimizer
from megatron_bit.parallel.agree import on_every_rank, on_rank0
from megatron_bit.parallel.groups import Groups
from megatron_bit.parallel.split import train_flops
from megatron_bit.planning.parameters import parameter_counts
from megatron_bit.run import rewind
from megatron_bit.run.folder import record_start
from megatron_bit.run.identity import compare_run, of_checkpoint
from megatron_bit.run.state import TrainState


@dataclass(frozen=True)
class Start:
    """What was found before a model's weights are touched."""

    run: Path
    checkpoint: Path | None  # the newest undamaged one of the run
    verified: float  # seconds that this took
    weights: Weights | None  # of `train.init_from`, for a run without a checkpoint
    meta: dict[str, Any] | None  # the checkpoint's

    def load(self, config: Config, optimizer: Optimizer, groups: Groups) -> TrainState:
        """Fill optimizer and model, and say on rank 0 how the run begins. All ranks call it."""
        begin, state, gone_back, taken = time.perf_counter(), TrainState(), False, ""
        if self.checkpoint is not None and self.meta is not None:
            state = restore(self.checkpoint, self.meta, optimizer, groups)
            back = on_rank0(lambda: rewind.read(self.run))
            gone_back = back is not None and back.catch_up(state)
        if self.weights is not None:
            on_every_rank(functools.partial(fill, self.weights, optimizer, groups))
            optimizer.loaded(0)
            of = config.train.init_from
            partial = f"the layers of {of}; embedding and head begin untrained"
            taken = f" from {partial if self.weights.partial else f'all of {of}'}"
        if groups.rank == 0:
            device = "CPU, gloo" if groups.device.type == "cpu" else f"{torch.cuda.get_device_name()}, NCCL"
            said = f"a new run{taken}"
            if self.checkpoint is not None:
                took = f"(verified in {self.verified:.1f} s, read in {time.perf_counter() - begin:.1f} s)"
                said = f"continuing {self.checkpoint} at step {state.step} {took}"
            said += f", behind sample {state.samples} (rewind {state.rewinds})" if gone_back else ""
            print(f"{config.run}: {groups.dims}, ZeRO-{groups.dims.zero_stage} on {device}; {said}", flush=True)
            print(_banner(config), flush=True)
        return state


def _banner(config: Config) -> str:
    """What is trained on what, in one line."""
    tokens = config.train.global_batch_size * config.data.seq_length
    total = tokens * config.train.steps
    return (
        f"{sum(parameter_counts(config).values()):,} parameters, {train_flops(config) / 1e6:.4g} MFLOP a token; "
        f"{tokens:,} tokens a step, {total:,} in {config.train.steps:,} steps: {total * train_flops(config):.3g} FLOP; "
        f"data {', '.join(config.data.folders)}"
    )


def find_start(config: Config, mine: dict[str, Any], mirror: Mirror | None, groups: Groups) -> Start:
    """Where this start begins, written down in the run folder. All ranks call it, when nothing else can be wrong."""
    run, begin, weights = Path(config.run), time.perf_counter(), None
    checkpoint = newest_undamaged(run / "checkpoints", groups)
    verified = time.perf_counter() - begin
    if mirror is not None and checkpoint is not None:
        on_rank0(functools.partial(mirror.catch_up, checkpoint))
    if checkpoint is None and config.train.init_from is not None:
        weights = on_every_rank(functools.partial(open_weights, config.train.init_from, mine, groups))
    meta = on_rank0(functools.partial(record_start, config, mine, checkpoint))
    return Start(run, checkpoint, verified, weights, meta)


def open_mirror(config: Config, mine: dict[str, Any]) -> Mirror | None:
    """`checkpoint.mirror`, after a newer checkpoint there than the run has was fetched. All ranks call it."""
    if not config.checkpoint.mirror:
        return None
    mirror = Mirror(config.checkpoint.mirror, config.checkpoint.keep, config.checkpoint.keep_every)
    on_rank0(functools.partial(_fetch, mirror, Path(config.run), mine))
    return mirror


def _fetch(mirror: Mirror, run: Path, mine: dict[str, Any]) -> None:
    def check(meta: dict[str, Any], where: str) -> None:
        compare_run(of_checkpoint(meta, where), mine, where)

    mirror.open()
    mirror.went_back(rewind.read(run))
    line = mirror.fetch_newer(run / "checkpoints", check)
    if line:
        print(line, flush=True)


def restore(checkpoint: Path, meta: dict[str, Any], optimizer: Optimizer, groups: Groups) -> TrainState:
    """Load all that a checkpoint has into an optimizer and its model; returns the counters. All ranks call it."""
    on_every_rank(functools.partial(load_optimizer, checkpoint, optimizer, groups))
    on_every_rank(functools.partial(load_scaling, checkpoint, optimizer.chunks))
    optimizer.loaded(meta["updates"])  # a collective: only when every rank has read its part
    load_noise_table(meta, optimizer.chunks)
    return TrainState(**meta["state"])
