"""Fixtures of tests that build models in their own process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megatron_bit.config import load_config
from megatron_bit.parallel import groups as parallel_groups
from megatron_bit.parallel.groups import Groups


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


_worlds: list[Groups] = []


def of_one() -> Groups:
    """A world of one, made once: each has 54 threads, of which 18 look for work a hundred times a second."""
    if not (_worlds and dist.is_initialized()):  # what a benchmark has begun it also ends
        _worlds[:] = [parallel_groups.init(load_config(preset="laptop"))]
    return _worlds[0]


@pytest.fixture(scope="session")
def groups() -> Iterator[Groups]:
    yield of_one()
    parallel_groups.shutdown()
