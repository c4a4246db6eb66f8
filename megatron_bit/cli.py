"""The command line. Every command imports what it needs when it is called: `--help` imports no torch."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_bit import environment
from megatron_bit.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, LocalUserError, Stopped, UserError

Args = Annotated[tuple[str, ...], tyro.conf.Positional]


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
    continues.

    Args:
        args: a YAML file or a run folder, then key=value pairs.
        preset: laptop, 125m, 1b or 8b.
        nproc: ranks to start on this machine.
        dry_run: print the resolved configuration, parameter counts, memory a rank and the layout; train nothing.
        world_size: with --dry-run, plan for this many ranks.
        json: with --dry-run, print JSON.
    """
    from megatron_bit.parallel.dims import ParallelDims
    from megatron_bit.run_folder import resolve

    target, overrides = _split(args)
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
        from megatron_bit.plan import describe, render

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
    ParallelDims.build(config, world)  # before any rank starts
    if nproc > 1:
        from mbit_launcher.local import run_local

        return run_local(["train", *args, *(["--preset", preset] if preset else [])], nproc)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # until the first step there is nothing to save
        signal.signal(number, lambda *_: os._exit(EXIT_PREEMPTED))
    # a rank that asks the store of one that has left gets an answer, and a C++ stack as a warning
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from megatron_bit import train as job

    return job.main(config)


def prepare(
    inputs: Annotated[Args, tyro.conf.arg(metavar="INPUT ...")],
    out: Path,
    vocab_size: int | None = None,
    tokenizer: Path | None = None,
    model_type: Literal["bpe", "unigram"] | None = None,
    validation_fraction: float = 0.02,
    shard_tokens: int = 2_000_000,
    tokenizer_sample_bytes: int | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> int:
    """Turn text into shards: train a tokenizer (or take one), tokenize, write webdataset tars and a manifest.

    Args:
        inputs: text files, folders (recursive), globs, .gz and .xz; `stdlib` is Python's own standard library.
        out: folder to write.
        vocab_size: of the tokenizer to train; default 4096.
        tokenizer: an existing SentencePiece .model, instead of training one.
        model_type: of the tokenizer to train; default bpe.
        validation_fraction: share of the documents held out, chosen by their hash.
        shard_tokens: tokens of one shard.
        tokenizer_sample_bytes: text to train the tokenizer on; default 8,000,000.
        workers: processes; default all CPUs of the job.
        quiet: no progress.
    """
    from mbit_data.prepare import PrepareOptions
    from mbit_data.prepare import prepare as run

    extra = {} if workers is None else {"workers": workers}
    options = PrepareOptions(
        inputs=tuple(inputs),
        out=out,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        model_type=model_type,
        tokenizer_sample_bytes=tokenizer_sample_bytes,
        validation_fraction=validation_fraction,
        shard_tokens=shard_tokens,
        **extra,
    )
    manifest = run(options, progress=not quiet)
    train_split, held = manifest.split("train"), manifest.split("validation")
    print(
        f"{out}: {train_split.tokens:,} training and {held.tokens:,} validation tokens in "
        f"{len(train_split.shards) + len(held.shards)} shards, vocabulary {manifest.vocab_size:,}"
    )
    return 0


def verify(folder: Annotated[Path, tyro.conf.Positional]) -> int:
    """Hash every shard of a data folder again; name the damaged ones. Exit code 2 if there are any."""
    from mbit_data.verify import verify as run

    problems = run(folder)
    for problem in problems:
        print(problem)
    print(f"{folder}: {f'{len(problems)} problems' if problems else 'complete and undamaged'}")
    return EXIT_USER_ERROR if problems else 0


def generate(
    run: Annotated[Path, tyro.conf.Positional],
    prompt: tuple[str, ...] = ("",),
    max_tokens: int = 128,
    steps: int = 32,
    sampler: str = "ode",
    seed: int = 0,
    data: str | None = None,
    json: bool = False,
) -> int:
    """Generate text from the newest checkpoint of a run, in one process.

    Args:
        run: run folder or checkpoint folder.
        prompt: one or more texts to continue.
        max_tokens: tokens to produce, rounded up to whole blocks of K.
        steps: denoising steps a block.
        sampler: how the noise is removed: ode.
        seed: the same seed gives the same text.
        data: the run's data folder, if it has moved.
        json: print JSON lines.
    """
    from megatron_bit.diffusion.sampler import SAMPLERS
    from megatron_bit.inference import generate as job

    if sampler not in SAMPLERS:
        raise UserError(f"--sampler {sampler} does not exist; choose one of {', '.join(SAMPLERS)}")
    if steps < 2 or max_tokens < 1:
        raise UserError(f"--steps {steps} has to be at least 2 and --max-tokens {max_tokens} at least 1")
    results = job.main(run, prompt, max_tokens, steps, sampler, seed, data)
    for result in results:
        if json:
            from json import dumps

            print(dumps(result))
        else:
            rate = f"{result['tokens']} tokens in {result['seconds']} s, {result['tokens_per_second']} tokens/s"
            bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
            print(f"--- step {result['step']}, {rate}\n{result['prompt']}{bold}{result['text']}{plain}")
    return 0


def checkpoint_ls(target: Annotated[Path, tyro.conf.Positional], json: bool = False) -> int:
    """List the complete checkpoints of a run: step, tokens, size, time, layout.

    Args:
        target: run folder.
        json: print JSON.
    """
    from megatron_bit.checkpoint import commands

    return commands.ls(target, json)


def checkpoint_verify(target: Annotated[Path, tyro.conf.Positional]) -> int:
    """Hash every file of a run's checkpoints, or of one checkpoint, again. Exit code 2 if anything is damaged.

    Args:
        target: run folder, or one of its checkpoints.
    """
    from megatron_bit.checkpoint import commands

    return commands.verify(target)


def checkpoint_diff(
    a: Annotated[Path, tyro.conf.Positional], b: Annotated[Path, tyro.conf.Positional], json: bool = False
) -> int:
    """Compare two checkpoints of any layouts: configuration, and every tensor. Exit code 1 if tensors differ.

    Args:
        a: run folder (its newest checkpoint) or checkpoint folder.
        b: the other one.
        json: print JSON.
    """
    from megatron_bit.checkpoint import commands

    return commands.diff(a, b, json)


def checkpoint_rm(
    run: Annotated[Path, tyro.conf.Positional],
    step: tuple[int, ...],
    force: bool = False,
) -> int:
    """Delete checkpoints of a run that no job is training.

    Args:
        run: run folder.
        step: one or more steps.
        force: also the newest one.
    """
    from megatron_bit.checkpoint import commands

    return commands.rm(run, step, force)


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
    from megatron_bit.config import load_config

    target, overrides = _split(args)
    return step.main(load_config(target, overrides, None if target else preset), steps, repeats, json)


def demo(text: tuple[str, ...] = ("stdlib",), out: Path = Path("demo"), steps: int = 300) -> int:
    """See it work: prepare, train on four ranks, continue on two, generate before and after. A few minutes, offline.

    Args:
        text: files or folders to train on; `stdlib` is Python's own standard library.
        out: folder for data and run.
        steps: training steps.
    """
    from megatron_bit.demo import main as run

    if steps < 2:
        raise UserError(f"--steps {steps} has to be at least 2: the demo stops half-way and continues")
    return run(text, out, steps)


def doctor(json: bool = False) -> int:
    """Say what this machine has, what is missing, what that costs and how to get it.

    Args:
        json: print JSON.
    """
    from megatron_bit.doctor import main as run

    return run(json)


def config() -> int:
    """List every configuration key with its type, default and meaning, as Markdown."""
    from megatron_bit.reference import markdown

    print(markdown(), end="")
    return 0


def data() -> int:
    """Look after data folders: verify."""
    raise UserError("`megatron-bit data` needs a command; see `megatron-bit data --help`")


def checkpoint() -> int:
    """Look after the checkpoints of a run: ls, verify, diff, rm."""
    raise UserError("`megatron-bit checkpoint` needs a command; see `megatron-bit checkpoint --help`")


def bench() -> int:
    """Measure this system against what it is compared with: step."""
    raise UserError("`megatron-bit bench` needs a command; see `megatron-bit bench --help`")


COMMANDS = {
    "prepare": prepare,
    "train": train,
    "generate": generate,
    "data": data,
    "checkpoint": checkpoint,
    "bench": bench,
    "config": config,
    "doctor": doctor,
    "demo": demo,
}
GROUPS = {
    "data": {"verify": verify},
    "checkpoint": {
        "ls": checkpoint_ls,
        "verify": checkpoint_verify,
        "diff": checkpoint_diff,
        "rm": checkpoint_rm,
    },
    "bench": {"step": bench_step},
}


def main() -> None:
    """Entry point: run a command, print a user's mistake as one line, and leave with its exit code."""
    rank, distributed = 0, False
    try:
        rank, distributed = environment.environment_int("RANK", 0), environment.environment_int("WORLD_SIZE", 1) > 1
        code = _dispatch(sys.argv[1:])
    except UserError as error:
        code = EXIT_USER_ERROR
        if isinstance(error, LocalUserError) or (rank == 0 and not isinstance(error, Stopped)):
            where = f" (rank {rank})" if isinstance(error, LocalUserError) and distributed else ""
            print(f"megatron-bit: error: {' '.join(str(error).split())}{where}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        code = 130
    except ConnectionError as error:  # another rank has gone, and says itself why
        code = 1
        print(f"[rank {rank}] stopped: {error}" if distributed else f"failed: {error}", file=sys.stderr)
    except SystemExit:
        raise
    except BaseException:
        code = 1
        print(f"[rank {rank}] failed:" if distributed else "failed:", file=sys.stderr)
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if distributed and code:
        os._exit(code)  # tearing down groups would wait for ranks that are still in a collective
    sys.exit(code)


def _dispatch(argv: list[str]) -> int:
    if argv and argv[0] in GROUPS and len(argv) > 1:
        group, prog, about = GROUPS[argv[0]], f"megatron-bit {argv[0]}", COMMANDS[argv[0]].__doc__
        argv = argv[1:]
    else:
        group, prog = COMMANDS, "megatron-bit"
        about = "Pretrain language models that write tokens as bits, K at a time."
    if argv and argv[0] in ("train", "step"):
        argv = _positional_first(argv)
    return tyro.extras.subcommand_cli_from_dict(group, prog=prog, description=about, args=argv)


def _positional_first(argv: list[str]) -> list[str]:
    """CONFIG and key=value may stand anywhere, also behind options; the parser wants them side by side."""
    words, options, value_follows = [], [], False
    for word in argv[1:]:
        if value_follows or word.startswith("-"):
            value_follows = not value_follows and "=" not in word and word.replace("_", "-") not in _SWITCHES
            options.append(word)
        else:
            words.append(word)
    return [argv[0], *words, *options]


_SWITCHES = {f"--{no}{name}" for no in ("", "no-") for name in ("dry-run", "json")} | {"-h", "--help"}


def _split(args: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """(file or folder, overrides) of the positional arguments."""
    targets = [a for a in args if "=" not in a]
    if len(targets) > 1:
        raise UserError(f"{targets[1]!r} is neither key=value nor the one configuration, which is {targets[0]!r}")
    return next(iter(targets), None), tuple(a for a in args if "=" in a)
