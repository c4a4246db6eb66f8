"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# the same examples in every run: what CI refuses can be seen again here. HYPOTHESIS_PROFILE=default looks for new ones
settings.register_profile("same", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


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
