"""The commands that look after checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


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
