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
    inputs: Annotated[Args, tyro.conf.arg(metavar="INPUT ...")] = (),
    *,
    out: Path,
    vocab_size: int | None = None,
    tokenizer: Path | None = None,
    eos_token: str | None = None,
    model_type: Literal["bpe", "unigram"] | None = None,
    validation_fraction: float = 0.02,
    shard_tokens: int = 2_000_000,
    tokenizer_sample_bytes: int | None = None,
    text_key: str = "text",
    on_error: Literal["stop", "skip"] = "stop",
    dedup: Literal["exact", "near"] | None = None,
    min_chars: int | None = None,
    max_chars: int | None = None,
    min_alpha_fraction: float | None = None,
    max_symbol_ratio: float | None = None,
    max_duplicate_lines: float | None = None,
    max_repeated_ngrams: float | None = None,
    workers: int | None = None,
    array: bool = False,
    array_index: int | None = None,
    array_count: int | None = None,
    join: bool = False,
    quiet: bool = False,
) -> int:
    """Turn text into shards: train a tokenizer (or take one), tokenize, write webdataset tars and a manifest.

    Interrupted, the same command goes on behind the last finished shard.

    Args:
        inputs: text, .jsonl, .parquet, also .gz, .xz, .zst; folders, globs; `stdlib`: Python's own standard library.
        out: folder to write.
        vocab_size: of the tokenizer to train; default 4096.
        tokenizer: an existing SentencePiece .model or Hugging Face tokenizer.json, instead of training one.
        eos_token: token that ends a document, where a tokenizer.json does not tell.
        model_type: of the tokenizer to train; default bpe.
        validation_fraction: share of the documents held out, chosen by their hash.
        shard_tokens: tokens of one shard.
        tokenizer_sample_bytes: text to train the tokenizer on; default 8,000,000.
        text_key: key of the text in JSON lines, and column in Parquet.
        on_error: at a record that is damaged: stop, or leave it out and count it.
        dedup: leave out copies: of the same text but for white space, or of nearly the same words.
        min_chars: leave out shorter documents.
        max_chars: leave out longer documents.
        min_alpha_fraction: least share of words with a letter in them; 0.8 is usual.
        max_symbol_ratio: most "#" and "..." for each word; 0.1 is usual.
        max_duplicate_lines: greatest share of lines that repeat another one; 0.3 is usual.
        max_repeated_ngrams: greatest share of text in repeated 5-grams of words; 0.15 is usual.
        workers: processes; default all CPUs of the job.
        array: do the share of this task of a SLURM job array.
        array_index: do share number I, from 0 ...
        array_count: ... of N.
        join: make the manifest when all shares are done; only --out is needed.
        quiet: no progress.
    """
    from mbit_data.filters import Filters
    from mbit_data.options import Part, PrepareOptions

    if (array_index is None) != (array_count is None) or (array and array_index is not None):
        raise UserError("a share is --array-index I with --array-count N, or --array in a SLURM job array")
    if join:
        if inputs or array or array_index is not None:
            raise UserError("--join takes the parts in --out as they are: leave out inputs and --array options")
        from mbit_data.array import join as run_join

        return _prepared(run_join(out, progress=not quiet))
    part = Part(array_index, array_count) if array_index is not None and array_count is not None else None
    if array:
        from mbit_data.array import part_from_environment

        part = part_from_environment()
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
        eos_token=eos_token,
        text_key=text_key,
        on_error=on_error,
        dedup=dedup,
        filters=Filters(
            min_chars=min_chars,
            max_chars=max_chars,
            min_alpha_fraction=min_alpha_fraction,
            max_symbol_ratio=max_symbol_ratio,
            max_duplicate_lines=max_duplicate_lines,
            max_repeated_ngrams=max_repeated_ngrams,
        ),
        part=part,
        **extra,
    )
    if part is None:
        from mbit_data.prepare import prepare as run

        return _prepared(run(options, progress=not quiet))
    from mbit_data.array import prepare_part

    print(f"{out}: {prepare_part(options, progress=not quiet).describe(out)}")
    return 0


def _prepared(manifest) -> int:
    from mbit_data.work import describe_dropped

    train_split, held = manifest.split("train"), manifest.split("validation")
    left_out = f"; left out: {describe_dropped(manifest.dropped)}" if manifest.dropped else ""
    print(
        f"{manifest.folder}: {train_split.tokens:,} training and {held.tokens:,} validation tokens in "
        f"{len(train_split.shards) + len(held.shards)} shards, vocabulary {manifest.vocab_size:,}{left_out}"
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


def inspect(
    folder: Annotated[Path, tyro.conf.Positional],
    split: Literal["train", "validation"] = "train",
    samples: int = 3,
    seed: int = 0,
    chars: int = 300,
    tokens: int = 8,
    bits: int | None = None,
    code: Literal["binary", "gray", "random"] | None = None,
    json: bool = False,
) -> int:
    """Show what a data folder holds: counts, options, document lengths, samples with the bits of their first tokens.

    Args:
        folder: data folder.
        split: where to look for samples and lengths.
        samples: documents to show.
        seed: another one shows other documents.
        chars: of each sample.
        tokens: of each sample to show with their ids.
        bits: show the bits of these tokens, so many of them, as model.bits; with --code alone the fewest possible.
        code: show them under this code, as model.code; with --bits alone binary.
        json: print JSON.
    """
    from mbit_data import inspection as job

    for option, value in (("--samples", samples), ("--chars", chars), ("--tokens", tokens)):
        if value < 0:
            raise UserError(f"{option} {value} has to be at least 0")
    report = job.inspect(folder, split, samples, seed, chars, tokens, bits, code)
    if json:
        from json import dumps

        print(dumps(report, indent=1))
    else:
        print(job.render(report))
    return 0


def generate(
    run: Annotated[Path, tyro.conf.Positional],
    prompt: tuple[str, ...] = (),
    prompt_file: Path | None = None,
    max_tokens: int = 128,
    steps: int = 32,
    sampler: str = "ode",
    seed: int = 0,
    stop: tuple[str, ...] = (),
    batch_size: int = 1,
    stream: bool = False,
    data: str | None = None,
    json: bool = False,
) -> int:
    """Generate text from the newest checkpoint of a run, or from a converted folder, in one process.

    Prompt number i with one seed has one text, whatever the batch.

    Args:
        run: run folder, checkpoint folder, or what `convert` has made.
        prompt: one or more texts to continue; without any, a text from its beginning.
        prompt_file: texts to continue, one a line, after those of --prompt.
        max_tokens: most tokens to produce for a prompt.
        steps: denoising steps a block.
        sampler: how the noise is removed: ode.
        seed: the same seed gives the same text.
        stop: a text ends when one of these strings has appeared in it.
        batch_size: prompts generated together.
        stream: print the text as it is made, one prompt at a time.
        data: the run's data folder, if it has moved.
        json: print JSON lines.
    """
    for option, value, least in (
        ("--steps", steps, 2),
        ("--max-tokens", max_tokens, 1),
        ("--batch-size", batch_size, 1),
    ):
        if value < least:
            raise UserError(f"{option} {value} has to be at least {least}")
    if stream and (json or batch_size > 1):
        raise UserError("--stream prints one text at a time: leave out --json and --batch-size")
    if "" in stop:
        raise UserError("--stop '' is an empty string; give the text to stop at")
    prompts = [*prompt, *(_lines(prompt_file) if prompt_file is not None else ())]
    from megatron_bit.inference import generate as job

    if sampler not in job.SAMPLERS:
        raise UserError(f"--sampler {sampler} does not exist; choose one of {', '.join(job.SAMPLERS)}")
    prompts = prompts or [""]
    results = job.main(
        run,
        prompts,
        max_tokens,
        steps=steps,
        sampler=sampler,
        seed=seed,
        data=data,
        batch_size=batch_size,
        stop=stop,
        show=stream,
    )
    for result in results:
        if json:
            from json import dumps

            print(dumps(result), flush=True)
            continue
        line = (
            f"--- step {result['step']}, {result['tokens']} tokens in {result['seconds']} s, "
            f"{result['tokens_per_second']} tokens/s, first block after {result['seconds_to_first_block']} s"
        )
        bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
        print(line if stream else f"{line}\n{result['prompt']}{bold}{result['text']}{plain}", flush=True)
    return 0


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {path} cannot be read: {error}; give a text file, one prompt a line") from None
    if not lines:
        raise UserError(f"--prompt-file {path} is empty; give one prompt a line")
    return lines


def convert(
    run: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    to: Literal["hf"] = "hf",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    shard_size: str = "5GB",
    data: str | None = None,
) -> int:
    """Convert a checkpoint to a Hugging Face folder: weights, tokenizer and the code that runs them in transformers.

    Args:
        run: run folder (its newest checkpoint) or checkpoint folder.
        out: folder to make; it may not have anything in it.
        to: the form: hf.
        dtype: of the weights.
        shard_size: above it the weights are several files, such as 5GB or 500MiB.
        data: the run's data folder, if it has moved.
    """
    from megatron_bit.inference.convert import to_hf

    to_hf(run, out, dtype=dtype, shard_size=shard_size, data=data)
    return 0


def serve(
    run: Annotated[Path, tyro.conf.Positional],
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    concurrency: int = 1,
    waiting: int = 32,
    max_tokens: int = 2048,
    data: str | None = None,
) -> int:
    """Serve a model over HTTP: OpenAI's /v1/completions with streaming, /v1/models, /health, /metrics.

    With MEGATRON_BIT_API_KEY in the environment, requests have to carry it as a bearer token.

    Args:
        run: run folder, checkpoint folder or converted folder.
        host: address to listen on; anything but a loopback address opens the server to others.
        port: port to listen on.
        name: of the model, in requests; default the folder's name.
        concurrency: requests that run at the same time.
        waiting: requests that may wait; one more is answered with 429.
        max_tokens: most tokens that a request may ask for.
        data: the run's data folder, if it has moved.
    """
    try:
        from megatron_bit.inference import serve as job
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}: pip install 'megatron-bit[serve]'") from None
    if not (1 <= port <= 65535 and concurrency >= 1 and waiting >= 0 and max_tokens >= 1):
        raise UserError(
            f"--port {port} has to be 1 to 65535, --concurrency {concurrency} and --max-tokens {max_tokens} at "
            f"least 1, --waiting {waiting} at least 0"
        )
    return job.main(run, host, port, name or run.resolve().name, concurrency, waiting, max_tokens, data)


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


def bench_generate(
    args: Annotated[Args, tyro.conf.arg(metavar="[CONFIG.yaml] [key=value ...]")] = (),
    preset: str = "laptop",
    vocab_size: int = 4096,
    batch: tuple[int, ...] = (1, 8, 64),
    steps: tuple[int, ...] = (8, 16, 32),
    tokens: int = 64,
    prompt: int = 32,
    repeats: int = 5,
    json: bool = False,
) -> int:
    """Time generation against transformers' Llama of the same shape, in turn. Both are untrained.

    Args:
        args: a YAML file and key=value pairs.
        preset: the model to time.
        vocab_size: of both models.
        batch: batch sizes.
        steps: denoising steps a block to try.
        tokens: new tokens of each text.
        prompt: tokens of each prompt.
        repeats: timed runs of each, in turn.
        json: print JSON.
    """
    from megatron_bit.bench import generate as job
    from megatron_bit.config import load_config

    if min(*batch, *steps, tokens, prompt, repeats) < 1 or min(steps) < 2:
        raise UserError("bench generate: --steps are at least 2, all other numbers at least 1")
    target, overrides = _split(args)
    config = load_config(target, overrides, None if target else preset)
    return job.main(
        config, vocab_size=vocab_size, batches=batch, steps=steps, tokens=tokens, prompt=prompt, repeats=repeats,
        as_json=json,
    )  # fmt: skip


def bench_prepare(
    inputs: Annotated[Args, tyro.conf.arg(metavar="INPUT ...")] = ("stdlib",),
    megabytes: int = 20,
    tokenizer: Path | None = None,
    workers: tuple[int, ...] = (1, 2),
    repeats: int = 3,
    json: bool = False,
) -> int:
    """Time `prepare` with several numbers of workers against the tokenizer alone, in turn.

    Args:
        inputs: as of prepare.
        megabytes: of text to take from them.
        tokenizer: .model or tokenizer.json; default a new one of 4096 pieces.
        workers: numbers of processes.
        repeats: of each.
        json: print JSON.
    """
    for option, value in (("--megabytes", megabytes), ("--workers", min(workers)), ("--repeats", repeats)):
        if value < 1:
            raise UserError(f"{option} {value} has to be at least 1")
    from mbit_data import bench as job

    result = job.measure(inputs, megabytes, tokenizer, workers, repeats)
    if json:
        from json import dumps

        print(dumps(result, indent=1))
    else:
        print(job.render(result))
    return 0


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
    """Look after data folders: inspect, verify."""
    raise UserError("`megatron-bit data` needs a command; see `megatron-bit data --help`")


def checkpoint() -> int:
    """Look after the checkpoints of a run: ls, verify, diff, rm."""
    raise UserError("`megatron-bit checkpoint` needs a command; see `megatron-bit checkpoint --help`")


def bench() -> int:
    """Measure this system against what it is compared with: step, generate, prepare."""
    raise UserError("`megatron-bit bench` needs a command; see `megatron-bit bench --help`")


COMMANDS = {
    "prepare": prepare,
    "train": train,
    "generate": generate,
    "serve": serve,
    "convert": convert,
    "data": data,
    "checkpoint": checkpoint,
    "bench": bench,
    "config": config,
    "doctor": doctor,
    "demo": demo,
}
GROUPS = {
    "data": {"inspect": inspect, "verify": verify},
    "checkpoint": {
        "ls": checkpoint_ls,
        "verify": checkpoint_verify,
        "diff": checkpoint_diff,
        "rm": checkpoint_rm,
    },
    "bench": {"step": bench_step, "generate": bench_generate, "prepare": bench_prepare},
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
