"""What torchrun and `--nproc` tell a rank through the environment. Imports no torch."""

from __future__ import annotations

import os

from megatron_bit.errors import UserError


def environment_int(name: str, default: int) -> int:
    """A number that torchrun sets; UserError if it is none."""
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"environment variable {name}={text!r} has to be a number; torchrun sets it") from None


def world_size() -> int:
    """Ranks of this job; 1 for a process that nobody started as a rank, whatever else has set WORLD_SIZE."""
    return environment_int("WORLD_SIZE", 1) if "RANK" in os.environ else 1
