"""From a configuration to a trainer: data, model, run folder, optimizer, state, callbacks."""

from __future__ import annotations

import functools
from pathlib import Path

from torch import Tensor

from megatron_bit.config import Config
from megatron_bit.data.corpus import Corpus, Tokens, open_corpus
from megatron_bit.data.manifest import Manifest
from megatron_bit.errors import UserError
from megatron_bit.io import trust
from megatron_bit.model.build import build_model
from megatron_bit.model.codec import learned_table
from megatron_bit.optim.build import build_optimizer
from megatron_bit.parallel.agree import on_every_rank, on_rank0
from megatron_bit.parallel.groups import Groups
from megatron_bit.run.belongings import take_along
from megatron_bit.run.folder import claim
from megatron_bit.run.identity import identity
from megatron_bit.run.lock import RunLock
from megatron_bit.training.callbacks.checkpoint import CheckpointCallback
from megatron_bit.training.callbacks.evaluate import EvaluateCallback
from megatron_bit.training.callbacks.heartbeat import HeartbeatCallback
from megatron_bit.training.callbacks.metrics import MetricsCallback
from megatron_bit.training.callbacks.preempt import PreemptCallback
from megatron_bit.training.start import find_start, open_mirror
from megatron_bit.training.trainer import Trainer


def build(config: Config, groups: Groups) -> Trainer:
    """Model, optimizer, data and callbacks, at the newest checkpoint of the run if it has one."""
    corpus = open_data(config)
    manifest = corpus.manifest
    chunks = build_model(config, manifest.vocab_size, groups, manifest.eos_id, open_code(config, manifest))
    mine = identity(config, corpus, chunks[0].code_table)
    lock = RunLock(Path(config.run))
    on_rank0(functools.partial(claim, config, mine, lock))
    mirror = open_mirror(config, mine)
    start = find_start(config, mine, mirror, groups)
    on_rank0(functools.partial(take_along, Path(config.run), config, manifest))
    config = config.with_vocab_size(manifest.vocab_size)  # not before: RUN/config.yaml is what was asked for
    optimizer = build_optimizer(config, chunks, groups)
    state = start.load(config, optimizer, groups)
    # the heartbeat first: a step is done before what follows it is, and a hang there is one after that step
    callbacks = (
        PreemptCallback(), HeartbeatCallback(), MetricsCallback(), EvaluateCallback(), CheckpointCallback(mirror),
    )  # fmt: skip
    return Trainer(config, groups, corpus, optimizer, state, callbacks, mine, lock, mirror)


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


def open_code(config: Config, manifest: Manifest) -> Tensor | None:
    """The table of a learned code, int8 [V, B], as rank 0 reads it, so that all have the same; else None."""
    if config.model.head.kind == "softmax":
        return None
    return on_rank0(functools.partial(learned_table, config.model.code, manifest, config.model.bits))
