"""`megatron-bit train`: load, build, fit."""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bit.checkpoint.init_from import fill, open_weights
from megatron_bit.checkpoint.load import load_noise_table, load_optimizer, load_scaling, newest_undamaged
from megatron_bit.checkpoint.mirror import Mirror
from megatron_bit.config import Config
from megatron_bit.data.corpus import Corpus, Tokens, open_corpus
from megatron_bit.data.manifest import Manifest
from megatron_bit.errors import EXIT_PREEMPTED, Diverged, RankLost, Stopped, UserError
from megatron_bit.io import trust
from megatron_bit.io.files import write_atomic
from megatron_bit.model.build import build_model
from megatron_bit.model.codec import learned_table
from megatron_bit.optim.build import build_optimizer
from megatron_bit.optim.optimizer import Optimizer
from megatron_bit.parallel import ending
from megatron_bit.parallel import groups as process_groups
from megatron_bit.parallel.agree import on_every_rank, on_rank0
from megatron_bit.parallel.groups import Groups
from megatron_bit.parallel.links import check_links
from megatron_bit.run import rewind
from megatron_bit.run.checkpoints import newest_until, read_meta
from megatron_bit.run.folder import claim, record_start
from megatron_bit.run.identity import compare_run, identity, of_checkpoint
from megatron_bit.run.lock import RunLock
from megatron_bit.run.log import roll_back
from megatron_bit.run.rewind import Rewind
from megatron_bit.run.state import TrainState
from megatron_bit.training.callbacks.checkpoint import CheckpointCallback
from megatron_bit.training.callbacks.evaluate import EvaluateCallback
from megatron_bit.training.callbacks.heartbeat import HeartbeatCallback
from megatron_bit.training.callbacks.metrics import MetricsCallback
from megatron_bit.training.callbacks.preempt import PreemptCallback
from megatron_bit.training.trainer import Trainer


def main(config: Config) -> int:
    """Train this run to its last step. Every rank of the job calls it.

    Returns:
        the exit code: 0, or 85 if a signal asked the run to save and leave.
    """
    config.data.check_set()  # before the groups: rank 0 must not leave while others still connect to it
    try:
        groups = process_groups.init(config)
        if "MBIT_ATTEMPT" in os.environ:  # a job of the launcher: job.sh
            said = check_links(groups)
            if groups.rank == 0:
                print(said, flush=True)
        trainer = build(config, groups)
        trainer.fit()
        while trainer.diverged:
            on_divergence(trainer)
            trainer.fit()
        if trainer.orphaned:
            why = on_rank0(trainer.lock.lost)
            raise UserError(f"{why}; {trainer.left}")
    except Exception as error:
        other = _last(error, config)
        if isinstance(other, RankLost):
            ending.mark_lost(Path(config.run), other)
        if other is error:
            raise
        raise other from None
    trainer.lock.release()
    process_groups.shutdown()
    return EXIT_PREEMPTED if trainer.preempted else 0


def _last(error: Exception, config: Config) -> Exception:
    """What to end with for an error of this rank, or one that it has because another one has ended."""
    other = ending.leaving(error)
    if other is error and isinstance(error, RuntimeError):
        ranks = ending.unheard(error)
        return ending.lost(error) if ranks is None else _not_heard(config, ranks)
    return other


def _not_heard(config: Config, ranks: list[int]) -> UserError:
    """One rank says it: the lowest that has waited; the others leave with the same exit code."""
    from mbit_launcher import heartbeats

    if dist.get_rank() != min(rank for rank in range(dist.get_world_size()) if rank not in ranks):
        return Stopped(exit_code=RankLost.exit_code)
    beats = {beat.rank: beat for beat in heartbeats.read(Path(config.run))}
    said = []
    for rank in ranks[:8]:
        beat = beats.get(rank)
        where = "" if beat is None else f" on {beat.host} (last step {beat.step}, {time.time() - beat.time:.0f} s ago)"
        said.append(f"rank {rank}{where}")
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    minutes = config.parallel.timeout_minutes
    return RankLost(
        f"{', '.join(said)}{more} did not answer for parallel.timeout_minutes = {minutes:g}; is the process stopped, "
        "or its node gone? The same command goes on from the newest checkpoint"
    )


def build(config: Config, groups: Groups) -> Trainer:
    """Model, optimizer, data and callbacks, at the newest checkpoint of the run if it has one."""
    corpus = open_data(config)
    manifest = corpus.manifest
    chunks = build_model(config, manifest.vocab_size, groups, manifest.eos_id, open_code(config, manifest))
    mine = identity(config, corpus, chunks[0].code_table)
    lock = RunLock(Path(config.run))
    on_rank0(functools.partial(claim, config, mine, lock))
    mirror = None
    if config.checkpoint.mirror:
        mirror = Mirror(config.checkpoint.mirror, config.checkpoint.keep, config.checkpoint.keep_every)
        on_rank0(functools.partial(_fetch, mirror, Path(config.run), mine))
    start = time.perf_counter()
    checkpoint = newest_undamaged(Path(config.run) / "checkpoints", groups)
    verified = time.perf_counter() - start
    if mirror is not None and checkpoint is not None:
        on_rank0(functools.partial(mirror.catch_up, checkpoint))
    weights = None
    if checkpoint is None and config.train.init_from is not None:
        weights = on_every_rank(functools.partial(open_weights, config.train.init_from, mine, groups))
    meta = on_rank0(functools.partial(record_start, config, mine, checkpoint))
    config = config.with_vocab_size(manifest.vocab_size)  # not before: RUN/config.yaml is what was asked for
    optimizer = build_optimizer(config, chunks, groups)
    state, gone_back = TrainState(), False
    start = time.perf_counter()
    if checkpoint is not None and meta is not None:
        state = restore(checkpoint, meta, optimizer, groups)
        back = on_rank0(lambda: rewind.read(Path(config.run)))
        gone_back = back is not None and back.catch_up(state)
    taken = ""
    if weights is not None:
        on_every_rank(functools.partial(fill, weights, optimizer, groups))
        optimizer.loaded(0)
        of = config.train.init_from
        taken = f"the layers of {of}; embedding and head begin untrained" if weights.partial else f"all of {of}"
    if groups.rank == 0:
        device = "CPU, gloo" if groups.device.type == "cpu" else f"{torch.cuda.get_device_name()}, NCCL"
        took = f" (verified in {verified:.1f} s, read in {time.perf_counter() - start:.1f} s)"
        begin = f"continuing {checkpoint} at step {state.step}{took}" if checkpoint else "a new run"
        begin += f" from {taken}" if taken else ""
        begin += f", behind sample {state.samples} (rewind {state.rewinds})" if gone_back else ""
        print(f"{config.run}: {groups.dims}, ZeRO-{groups.dims.zero_stage} on {device}; {begin}", flush=True)
    # the heartbeat first: a step is done before what follows it is, and a hang there is one after that step
    callbacks = (
        PreemptCallback(), HeartbeatCallback(), MetricsCallback(), EvaluateCallback(), CheckpointCallback(mirror),
    )  # fmt: skip
    return Trainer(config, groups, corpus, optimizer, state, callbacks, mine, lock, mirror)


def restore(checkpoint: Path, meta: dict[str, Any], optimizer: Optimizer, groups: Groups) -> TrainState:
    """Load all that a checkpoint has into an optimizer and its model; returns the counters. All ranks call it."""
    on_every_rank(functools.partial(load_optimizer, checkpoint, optimizer, groups))
    on_every_rank(functools.partial(load_scaling, checkpoint, optimizer.chunks))
    optimizer.loaded(meta["updates"])  # a collective: only when every rank has read its part
    load_noise_table(meta, optimizer.chunks)
    return TrainState(**meta["state"])


def on_divergence(trainer: Trainer) -> None:
    """Go back to the newest checkpoint from whose weights a finite loss was computed, and on behind the data that was
    seen since (PaLM, 2204.02311, section 5.1); or raise Diverged, on all ranks."""
    run, state, optim = trainer.run, trainer.state, trainer.config.optim

    def look() -> tuple[Path | None, str]:
        good = newest_until(run / "checkpoints", state.good)
        stop = optim.on_divergence == "stop" or state.rewinds >= optim.max_rewinds or good is None
        said = (
            f"{run} has diverged: up to step {state.step} {trainer.in_row} updates in a row were skipped or had no "
            f"finite loss; the newest checkpoint of before is {good or 'none'}"
        )
        if stop:
            write_atomic(run / "DIVERGED", f"{said}\n".encode())
            return None, said
        assert good is not None
        step = read_meta(good)["step"]
        back = Rewind(step, state.samples, state.rewinds + 1, state.replaced, state.damaged)
        rewind.write(run, back)  # first: a start after this one has died goes on from here too
        aside = list(rewind.set_aside(run, back))
        roll_back(run, step)
        if trainer.mirror is not None:
            trainer.mirror.went_back(back)
        print(f"warning: {said}; going on from there behind sample {state.samples} ({state.rewinds + 1} of "
              f"{optim.max_rewinds} rewinds)", *aside, sep="\n", flush=True)  # fmt: skip
        return good, said

    good, said = on_rank0(look)
    if good is None:
        newer = (
            "remove the newer ones (`megatron-bit checkpoint rm`), lower optim.lr or set optim.grad_clip, and continue"
        )
        raise Diverged(f"{said}; {newer}, or set optim.on_divergence=rewind")
    begun = restore(good, on_rank0(lambda: read_meta(good)), trainer.optimizer, trainer.groups)
    back = on_rank0(lambda: rewind.read(run))
    assert back is not None
    back.catch_up(begun)
    trainer.begin_again(begun)


def open_data(config: Config) -> Corpus:
    """The data, its files checked and its documents' lengths read once by rank 0; the same data on every rank."""
    block_size = config.model.block_size

    def first() -> tuple[str, list[Tokens]]:
        trust.check()
        corpus = open_corpus(config.data, block_size, check=config.data.on_error == "stop")
        if config.model.head.kind == "softmax":
            corpus.manifest.need_vocabulary("model.head.kind=softmax")
        if config.start_blocks is not None:
            corpus.manifest.need_vocabulary("data.document_boundaries")
        return corpus.fingerprint, [source.tokens for source in corpus.sources]

    fingerprint, tokens = on_rank0(first)
    trust.accept(*config.data.folders)

    def mine() -> Corpus:  # a node may not have it, or another one
        corpus = open_corpus(config.data, block_size, check=False, tokens=tokens)
        if corpus.fingerprint != fingerprint:
            raise UserError(
                f"data {', '.join(config.data.folders)} has fingerprint {corpus.fingerprint} here and {fingerprint} on "
                "rank 0; give every node the same folder"
            )
        return corpus

    return on_every_rank(mine)


def _fetch(mirror: Mirror, run: Path, mine: dict[str, Any]) -> None:
    def check(meta: dict[str, Any], where: str) -> None:
        compare_run(of_checkpoint(meta, where), mine, where)

    mirror.open()
    mirror.went_back(rewind.read(run))
    line = mirror.fetch_newer(run / "checkpoints", check)
    if line:
        print(line, flush=True)


def open_code(config: Config, manifest: Manifest) -> Tensor | None:
    """The table of a learned code, int8 [V, B], as rank 0 reads it, so that all have the same; else None."""
    if config.model.head.kind == "softmax":
        return None
    return on_rank0(functools.partial(learned_table, config.model.code, manifest, config.model.bits))
