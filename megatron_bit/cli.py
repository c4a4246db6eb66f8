"""The command line: which commands there are, and how one ends. `--help` imports no torch."""

from __future__ import annotations

import difflib
import os
import select
import signal
import sys
import traceback

import tyro

from megatron_bit import __version__
from megatron_bit.commands.arguments import PATHS
from megatron_bit.commands.checkpoints import checkpoint_diff, checkpoint_ls, checkpoint_rm, checkpoint_verify
from megatron_bit.commands.codes import codes
from megatron_bit.commands.data import bench_data, inspect, prepare, verify
from megatron_bit.commands.evaluation import evaluate
from megatron_bit.commands.inference import bench_generate, convert, generate, serve
from megatron_bit.commands.planning import plan
from megatron_bit.commands.plot import plot
from megatron_bit.commands.slurm import (
    cancel,
    chain,
    cluster,
    cluster_boot,
    cluster_crash,
    cluster_down,
    cluster_profiles,
    cluster_up,
    logs,
    resume,
    status,
    submit,
)
from megatron_bit.commands.training import bench_quality, bench_step, bench_train, config, demo, doctor, train
from megatron_bit.errors import Exhausted, LocalUserError, RankLost, Stopped, UserError
from megatron_bit.io import console, environment
from megatron_bit.io.exhausted import exhausted
from megatron_bit.io.text import shown

READER_LEFT = 128 + signal.SIGPIPE  # the exit code that a shell shows for other programs then


def data() -> int:
    """Look after data folders: inspect, verify."""
    raise UserError("`megatron-bit data` needs a command; see `megatron-bit data --help`")


def checkpoint() -> int:
    """Look after the checkpoints of a run: ls, verify, diff, rm."""
    raise UserError("`megatron-bit checkpoint` needs a command; see `megatron-bit checkpoint --help`")


def bench() -> int:
    """Measure this system against what it is compared with: step, train, generate, data."""
    raise UserError("`megatron-bit bench` needs a command; see `megatron-bit bench --help`")


COMMANDS = {
    "prepare": prepare,
    "codes": codes,
    "plan": plan,
    "train": train,
    "generate": generate,
    "serve": serve,
    "convert": convert,
    "evaluate": evaluate,
    "plot": plot,
    "data": data,
    "checkpoint": checkpoint,
    "bench": bench,
    "submit": submit,
    "chain": chain,
    "status": status,
    "logs": logs,
    "cancel": cancel,
    "resume": resume,
    "cluster": cluster,
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
    "cluster": {
        "profiles": cluster_profiles,
        "up": cluster_up,
        "down": cluster_down,
        "crash": cluster_crash,
        "boot": cluster_boot,
    },
    "bench": {
        "step": bench_step,
        "train": bench_train,
        "quality": bench_quality,
        "generate": bench_generate,
        "data": bench_data,
    },
}


def main() -> None:
    """Entry point: run a command, print a user's mistake as one line, and leave with its exit code."""
    rank, distributed = 0, False
    console.keep_descriptors()
    try:
        rank, distributed = environment.environment_int("RANK", 0), environment.environment_int("WORLD_SIZE", 1) > 1
        code = _dispatch(sys.argv[1:])
    except UserError as error:
        code = _say(exhausted(error) or error, rank, distributed)
    except KeyboardInterrupt:
        code = 130
    except SystemExit:
        raise
    except BaseException as error:
        out = exhausted(error)
        if out is not None:
            code = _say(out, rank, distributed)
        elif isinstance(error, BrokenPipeError) and not distributed and _reader_left():
            code = READER_LEFT
        elif isinstance(error, ConnectionError):  # another rank has gone, and says itself why
            code = 1
            print(f"[rank {rank}] stopped: {error}" if distributed else f"failed: {error}", file=sys.stderr)
        else:
            code = 1
            print(f"[rank {rank}] failed:" if distributed else "failed:", file=sys.stderr)
            traceback.print_exc()
    code = _flush() or code
    if distributed and code:
        os._exit(code)  # tearing down groups would wait for ranks that are still in a collective
    sys.exit(code)


def _reader_left() -> bool:
    """Whether nobody reads our output any more, as behind `| head`: another broken pipe is a failure."""
    watch = select.poll()
    watch.register(1, 0)
    return any(event & select.POLLERR for _, event in watch.poll(0))


def _flush() -> int:
    """Write out what is left; returns 0, or READER_LEFT."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python says at its end that it cannot be written
        return READER_LEFT
    return 0


def _say(error: UserError, rank: int, distributed: bool) -> int:
    """Print it, if it is for this rank to say; returns the exit code."""
    of_this_rank = isinstance(error, LocalUserError | RankLost | Exhausted)
    if of_this_rank or (rank == 0 and not isinstance(error, Stopped)):
        where = f" (rank {rank})" if isinstance(error, LocalUserError) and distributed else ""
        print(f"megatron-bit: error: {shown(' '.join(str(error).split()))}{where}", file=sys.stderr, flush=True)
    return error.exit_code


def _dispatch(argv: list[str]) -> int:
    if argv == ["--version"]:
        print(f"megatron-bit {__version__}")
        return 0
    if argv and argv[0] in GROUPS and len(argv) > 1:
        group, prog, about = GROUPS[argv[0]], f"megatron-bit {argv[0]}", COMMANDS[argv[0]].__doc__
        argv = argv[1:]
    else:
        group, prog = COMMANDS, "megatron-bit"
        about = "Pretrain language models that write tokens as bits, K at a time."
    if argv and not argv[0].startswith("-") and argv[0] not in group:
        close = difflib.get_close_matches(argv[0], group, n=1, cutoff=0.5)
        instead = f"did you mean {close[0]}?" if close else f"`{prog} --help` says what there is"
        raise UserError(f"{prog} has no command {argv[0]!r}; {instead}")
    # not `bench train`, whose options take several values
    anywhere = ("train", "plan", "submit", "chain", "resume") if group is COMMANDS else ("step",)
    if argv and argv[0] in anywhere:
        argv = _positional_first(argv)
    return tyro.extras.subcommand_cli_from_dict(group, prog=prog, description=about, args=argv, registry=PATHS)


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
