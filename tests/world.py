"""Fixtures of tests that build models in their own process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_bit.config import load_config
from megatron_bit.parallel import groups as parallel_groups
from megatron_bit.parallel.groups import Groups


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


_made: list[tuple[object, Groups]] = []  # the world of now, and torch's default group when it was made


def of_one() -> Groups:
    """A world of one, made once: each has 54 threads, of which 18 look for work a hundred times a second."""
    world = dist.group.WORLD if dist.is_initialized() else None
    if world is None or not _made or _made[0][0] is not world:  # what a benchmark has begun it also ends
        groups = parallel_groups.init(load_config(preset="laptop"))
        _made[:] = [(dist.group.WORLD, groups)]
    return _made[0][1]


@pytest.fixture
def groups() -> Groups:
    """For each test anew: one before it may have ended the world. The last one ends with the process."""
    return of_one()
