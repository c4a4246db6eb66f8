"""Fixtures of tests that build models in their own process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_bit.config import load_config
from megatron_bit.parallel import groups as parallel_groups
from megatron_bit.parallel.groups import Groups


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def groups() -> Iterator[Groups]:
    """A world of one."""
    yield parallel_groups.init(load_config(preset="laptop"))
    parallel_groups.shutdown()
