"""Every test file is one that `pytest` finds by itself: its own list of folders to leave out has had `dist` in it."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def test_no_folder_of_tests_is_left_out(pytestconfig: pytest.Config) -> None:
    patterns = pytestconfig.getini("norecursedirs")
    folders = {folder for file in TESTS.rglob("test_*.py") for folder in file.relative_to(TESTS).parents}
    assert Path("dist") in folders
    assert not [f for f in folders for part in f.parts for pattern in patterns if fnmatch(part, pattern)]
