"""One rank of a job that is going to be struck: the real command, which says through a pipe where it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

MOMENTS = ("start", "step", "validation", "save", "mirror", "shutdown")


def main(pipe: Any, rank: int, world_size: int, port: int, arguments: list[str], output: str) -> None:
    """Runs in a fork of the fork server: `megatron-bit train` as torchrun would start it, its output in a file.

    A line goes to `pipe` at the begin ("+step") and at the end ("-step") of each of MOMENTS.
    """
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({key: str(value) for key, value in here.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def say(text: str) -> None:
        os.write(pipe.fileno(), f"{text}\n".encode())  # short: lines of several threads do not mix

    say("+start")
    _tell(say)
    from megatron_bit import cli

    sys.argv = ["megatron-bit", "train", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 0 if end.code is None else 1)


def _tell(say: Callable[[str], None]) -> None:
    """Wrap what each moment consists of. Nothing of it changes what the rank does."""
    from megatron_bit.checkpoint import writer
    from megatron_bit.checkpoint.mirror import Mirror
    from megatron_bit.run import checkpoints as folder
    from megatron_bit.training.callbacks.evaluate import EvaluateCallback
    from megatron_bit.training.trainer import Trainer

    def around(owner: Any, name: str, moment: str) -> None:
        plain = getattr(owner, name)

        def told(*args: Any, **kwargs: Any) -> Any:
            say(f"+{moment}")
            try:
                return plain(*args, **kwargs)
            finally:
                say(f"-{moment}")

        setattr(owner, name, told)

    around(Trainer, "train_step", "step")
    around(EvaluateCallback, "bound", "validation")
    around(writer, "write_rank", "save")
    around(folder, "commit", "save")  # rank 0's thread; the part before is its own
    around(Mirror, "_copy", "mirror")
    fit = Trainer.fit

    def told(self: Trainer) -> None:
        say("-start")
        try:
            fit(self)
        finally:
            say("+shutdown")

    Trainer.fit = told  # type: ignore[method-assign]
