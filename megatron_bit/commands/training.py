"""The commands around a run. Each imports what it needs when it is called."""

from __future__ import annotations

import faulthandler
import os
import signal
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_bit.commands.arguments import Args, bitlm_configuration, split
from megatron_bit.errors import EXIT_PREEMPTED, UserError
from megatron_bit.io import console, environment


def train(
    args: Annotated[Args, tyro.conf.arg(metavar="[CONFIG.yaml|RUN] [key=value ...]")] = (),
    preset: str | None = None,
    nproc: int = 1,
    dry_run: bool = False,
    world_size: int | None = None,
    json: bool = False,
) -> int:
    """Train a BitLM, or continue a run.

    CONFIG is a YAML file; a run folder continues that run. key=value overrides any key of the configuration
    (`megatron-bit config` lists them), later layers win: defaults < preset < file < command line.

    Several processes: `--nproc N` starts N ranks on this machine; on a cluster use torchrun, with the same
    arguments: `torchrun --nproc-per-node 8 -m megatron_bit train CONFIG.yaml key=value`.

    Exit codes: 0 done; 2 a mistake in the input; 85 saved after SIGTERM, SIGUSR1 or Ctrl-C, and the same command
    continues; 86 diverged; 87 a rank does not answer; 88 a rank ran out of memory, threads or file descriptors.

    Args:
        args: a YAML file or a run folder, then key=value pairs.
        preset: laptop, 125m, 1b, 8b or bitlm.
        nproc: ranks to start on this machine.
        dry_run: print the resolved configuration, parameter counts, memory a rank and the layout; train nothing.
        world_size: with --dry-run, plan for this many ranks.
        json: with --dry-run, print JSON.
    """
    from megatron_bit.parallel import descriptors
    from megatron_bit.parallel.dims import ParallelDims
    from megatron_bit.run.folder import resolve, with_absolute_paths

    target, overrides = split(args, preset)
    if target is None and preset is None:
        raise UserError(
            "train needs CONFIG.yaml, a run folder, or --preset; try `megatron-bit train --preset laptop data.path=DIR`"
        )
    ranked = "RANK" in os.environ  # torchrun, or the parent of --nproc, has started this process
    for option, value in (("--nproc", nproc), ("--world-size", world_size)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value} has to be at least 1")
    if ranked and nproc > 1:
        raise UserError(
            f"--nproc {nproc} starts ranks, and torchrun has started this one (RANK is set); leave out one of them"
        )
    config = resolve(target, overrides, preset)
    world = environment.world_size() if ranked else nproc
    if dry_run:
        from megatron_bit.planning.dry_run import describe, render

        plan = describe(config, world_size or world)
        if json:
            from json import dumps

            print(dumps(plan, indent=1))
        else:
            from megatron_bit.config import to_yaml

            lines = "".join(f"# {line}\n" for line in render(plan).splitlines())  # the whole is a YAML file
            print(f"{to_yaml(config)}\n{lines}", end="")
        return 0
    if json or world_size is not None:
        raise UserError("--json and --world-size belong to --dry-run")
    dims = ParallelDims.build(config, world)  # before any rank starts
    if nproc > 1:
        from mbit_launcher.local import run_local

        descriptors.check_here(dims, gloo=False, already=8)  # what is sure; the ranks know whether it is gloo
        return run_local(["train", *args, *(["--preset", preset] if preset else [])], nproc)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):  # until the first step there is nothing to save
        # under nohup a lost terminal does not matter
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(EXIT_PREEMPTED))
    faulthandler.register(signal.SIGUSR2)  # a rank that hangs says where: the launcher's watchdog asks all of them
    # a rank that asks the store of one that has left gets an answer, and a C++ stack as a warning
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    console.outlive()
    from megatron_bit.training import job

    return job.main(with_absolute_paths(config))


def bench_step(
    args: Annotated[Args, tyro.conf.arg(metavar="[CONFIG.yaml] [key=value ...]")] = (),
    preset: str = "laptop",
    steps: int = 20,
    repeats: int = 5,
    json: bool = False,
) -> int:
    """Time the full trainer at one process against a plain PyTorch loop over the same model, in turn.

    Args:
        args: a YAML file and key=value pairs.
        preset: the model to time.
        steps: steps of one timed stretch.
        repeats: stretches of each, in turn.
        json: print JSON.
    """
    from megatron_bit.bench import step

    return step.main(bitlm_configuration(args, preset), steps, repeats, json)


def bench_train(
    args: Annotated[Args, tyro.conf.arg(metavar="[CONFIG.yaml] [key=value ...]")] = (),
    preset: str = "laptop",
    vocab_size: tuple[int, ...] = (32_768, 131_072, 256_000),
    precision: tuple[str, ...] = (),
    also: tuple[str, ...] = (),
    steps: int = 5,
    repeats: int = 5,
    json: bool = False,
) -> int:
    """Time training of a BitLM against softmax heads on its backbone and megatron-core's GPTModel, in turn.

    One process, random tokens, whole steps: all micro-batches of a global batch, and the optimizer, which is the same
    for all. GPTModel has the first vocabulary, and Transformer Engine's layers where there is one. MFU counts causal
    attention half and no recomputation, against the dense bf16 peak whatever the precision. Memory is the device's at
    the highest; on a CPU, which cannot say, what autograd keeps.

    Args:
        args: a YAML file and key=value pairs.
        preset: the model to time.
        vocab_size: vocabularies of the softmax heads.
        precision: values of train.precision to time, in the same run; default the configuration's.
        also: time BitLM with these settings as well, and say how fast it is without them; in quotes, several key=value
            pairs are one variant: --also "model.names=sum model.head.prior_rank=0" model.memory.rows=16384.
        steps: steps of one timed stretch.
        repeats: stretches of each, in turn.
        json: print JSON.
    """
    if min(*vocab_size, steps, repeats, len(vocab_size)) < 1:
        raise UserError("bench train: --vocab-size, --steps and --repeats need numbers of at least 1")
    one_rank = ("parallel.tp=1", "parallel.pp=1", "parallel.vpp=1", "parallel.zero_stage=0")
    precisions = [(f"train.precision={name}",) for name in precision] or [()]
    configs = [bitlm_configuration((*args, *one_rank, *extra), preset) for extra in precisions]
    variants = [
        {text: bitlm_configuration((*args, *one_rank, *extra, *text.split()), preset) for text in also}
        for extra in precisions
    ]
    for config, others in zip(configs, variants, strict=True):
        for text, other in others.items():
            if other.model_copy(update={"model": config.model, "diffusion": config.diffusion}) != config:
                raise UserError(f"bench train: --also {text!r} has to keep to the keys of model and diffusion")
    from megatron_bit.bench import train as job

    return job.main(configs, variants, vocab_size, steps, repeats, json)


def bench_quality(
    args: Annotated[Args, tyro.conf.arg(metavar="[key=value ...]")] = (),
    *,
    budget: Literal["small", "gpu"] = "small",
    data: Path | None = None,
    out: Path = Path("quality"),
    steps: int | None = None,
    tokens: tuple[str, ...] = (),
    sizes: tuple[str, ...] = (),
    seeds: int = 1,
    jobs: int | None = None,
    only: tuple[str, ...] = (),
    all_rungs: bool = False,
    minutes: float | None = None,
    json: bool = False,
) -> int:
    """Train a ladder of small models that differ in one switch each, and compare them with the softmax peer.

    All see the same data in the same order, and have the same number of parameters outside of tables. Writes
    OUT/quality.md and OUT/quality.json; interrupted, the same command goes on with the runs that have not finished,
    each from where it saved.

    Args:
        args: key=value pairs that hold for every rung.
        budget: small is for two CPU cores, gpu for one GPU.
        data: a data folder; without it Python's standard library is prepared (gpu: give your own).
        out: folder for runs and tables.
        steps: training steps of a rung; default 400 (small) or 3000 (gpu).
        tokens: budgets such as 0.4M 2M 8M instead of --steps: every rung is trained once with a constant rate, and has
            a short decay at each of them, of which the table shows the curve and a law.
        sizes: parameters outside of tables such as 0.3M 0.8M 3M: the ladder at each of the widths that have about so
            many, with a learning rate that falls with the width.
        seeds: seeds of the headline rungs; the others run once.
        jobs: runs at a time; default the number of cores (small), or 1.
        only: rungs of this whole name, or whose name contains this.
        all_rungs: also the rungs that say little more than others; half an hour is too short for them on two cores.
        minutes: save and end after these, with exit code 85 if runs are left, for the same command to go on: for a
            machine that is lent for some minutes at a time. The tables are of what has finished.
        json: print JSON.
    """
    from megatron_bit.bench import quality
    from megatron_bit.bench.machine import cores

    for option, value in (("--steps", steps), ("--seeds", seeds), ("--jobs", jobs)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value} has to be at least 1")
    if minutes is not None and not 0 < minutes < float("inf"):
        raise UserError(f"--minutes {minutes} has to be above 0")
    if tokens and steps is not None:
        raise UserError(
            f"--steps {steps} and --tokens {' '.join(tokens)} both say how long a rung is; give one of them"
        )
    jobs = jobs or (cores() if budget == "small" else 1)
    return quality.main(budget, out, data, steps, seeds, jobs, only, all_rungs, args, json, tokens, minutes, sizes)


def demo(
    text: tuple[str, ...] | None = None, out: Path = Path("demo"), steps: int | None = None, quick: bool = False
) -> int:
    """See it work: prepare, train on four ranks, continue on two, generate before and after. A few minutes, offline.

    Args:
        text: files or folders to train on; `stdlib` (default) is Python's own standard library.
        out: folder for data and run.
        steps: training steps; default 300.
        quick: in about a minute whether everything works here: 20 steps on one package of the standard library, unless
            --steps and --text say otherwise. Too few to learn much.
    """
    from megatron_bit.commands.demo import A_PACKAGE
    from megatron_bit.commands.demo import main as run

    if steps is None:
        steps = 20 if quick else 300
    if steps < 2:
        raise UserError(f"--steps {steps} has to be at least 2: the demo stops half-way and continues")
    return run(text or ((A_PACKAGE,) if quick else ("stdlib",)), out, steps)


def doctor(json: bool = False) -> int:
    """Say what this machine has, what is missing, what that costs and how to get it.

    Args:
        json: print JSON.
    """
    from megatron_bit.commands.doctor import main as run

    return run(json)


def config() -> int:
    """List every configuration key with its type, default and meaning, as Markdown."""
    from megatron_bit.commands.reference import markdown

    print(markdown(), end="")
    return 0
