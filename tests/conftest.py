"""Fixtures shared by all tests."""

from __future__ import annotations

import atexit
import gc
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# the same examples in every run: what CI refuses can be seen again here. HYPOTHESIS_PROFILE=default looks for new ones
settings.register_profile("same", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are shared; before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# folders whose tests share what takes long to make, the longest first; elsewhere a file is what stays together
TOGETHER = ("slurm", "inference", "cli")


def _group(nodeid: str) -> str:
    """What stays in one process of `pytest -n 2`."""
    file = Path(nodeid.partition("::")[0])
    folder = file.parts[1] if len(file.parts) > 1 else ""
    return folder if folder in TOGETHER else str(file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out groups. Not xdist's `loadgroup`, whose marks pytest 9.2 does not see (xdist 3.8)."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest is handed out first."""
    rank = {name: number for number, name in enumerate(TOGETHER)}
    items.sort(key=lambda item: rank.get(_group(item.nodeid), len(rank)))


def pytest_collection_finish() -> None:
    """What collecting has imported is not looked through again by every later collection of garbage."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or triton tells at the end what of it is left


@pytest.fixture(scope="session", autouse=True)
def signals_as_on_a_terminal() -> None:
    """Under nohup or as a background job SIGHUP and SIGINT are ignored, and what the tests start would inherit that."""
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data folder of real text (part of the standard library), vocabulary 421."""
    import tiny_runs

    folder = tmp_path_factory.mktemp("data") / "tiny"
    tiny_runs.prepare_data(folder)
    return folder
