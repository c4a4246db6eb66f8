"""`megatron-bit train`: build, fit, and how a job ends."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path

import torch.distributed as dist

from megatron_bit.config import Config
from megatron_bit.errors import EXIT_PREEMPTED, RankLost, Stopped, UserError
from megatron_bit.parallel import ending
from megatron_bit.parallel import groups as process_groups
from megatron_bit.parallel.agree import on_rank0
from megatron_bit.parallel.links import check_links
from megatron_bit.training.build import build
from megatron_bit.training.divergence import on_divergence


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
    if groups.rank == 0 and trainer.state.step >= config.train.steps:
        print(_next(config), flush=True)
    trainer.lock.release()
    process_groups.shutdown()
    return EXIT_PREEMPTED if trainer.preempted else 0


def _next(config: Config) -> str:
    """What to do with a run that is finished."""
    run = shlex.quote(config.run)
    records = config.model.code == "raw"
    return "\n".join(
        (
            f"{config.run} is finished. Next:",
            f"  megatron-bit generate {run}{'' if records else ' --prompt TEXT'}",
            f"  megatron-bit evaluate {run}",
            f"  megatron-bit plot {run}",
            f"  megatron-bit convert {run} --to hf DIR",
        )
    )


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
