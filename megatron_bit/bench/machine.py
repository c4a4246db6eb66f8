"""What a figure was measured on."""

from __future__ import annotations

import os
import platform


def cores() -> int:
    """CPU cores that this process may use: those of its cpuset, and not all of the machine's."""
    return len(os.sched_getaffinity(0))


def machine(device: str = "") -> str:
    """The device (by default the kind of CPU), cores, threads and torch of this process."""
    import torch

    name = device or platform.machine()
    return f"{name}, {cores()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
