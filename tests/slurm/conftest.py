"""One SLURM cluster for all tests that need one, and runs on it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for on_cluster, which only these tests share

from on_cluster import HERE, Run

REQUIRED = "MBIT_REQUIRE_SLURM"  # set by .ci/run: there a cluster that cannot be started is a failure


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """The folder of a cluster with seven nodes; SLURM_CONF is set to it. It ends with this process, however that does.

    n1, n2: left alone by the tests. n3 to n5: nodes that tests crash. n6, n7: the rest.
    """
    from mbit_launcher import minicluster

    reason = minicluster.missing()
    if reason and os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set, and there is no SLURM: {reason}")
    if reason:
        pytest.skip(f"no SLURM cluster here: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="mc-", dir="/tmp"))  # short: a socket lies in it
    before = os.environ.get("SLURM_CONF")
    try:
        os.environ["SLURM_CONF"] = str(minicluster.up(folder, nodes=7, gpus=2, with_parent=True))
        yield folder
    finally:
        minicluster.down(folder)
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)


PROFILE = {
    "partition": "train",
    "nodes": 2,
    "ranks_per_node": 2,
    "time": "30",
    "save_seconds": 30,
    "preflight": {"min_free_gib": "0.1"},
}
MakeRun = Callable[..., Run]


@pytest.fixture
def stand_in(cluster: Path, tmp_path: Path) -> MakeRun:
    """stand_in(mode, steps, profile keys) -> a run whose trainer is stand_in.py: no torch, a step takes 0.2 s."""
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "manifest.json").write_text("{}")

    def make(mode: str = "", steps: int = 12, name: str = "run", **profile: Any) -> Run:
        config = {
            "preset": "laptop",
            "data": {"path": str(tmp_path / "data")},
            "train": {"steps": steps, "global_batch_size": 16},
            "checkpoint": {"every": 5},
        }
        environment = {"REAL_PYTHON": sys.executable, "STAND_IN": mode}
        mine = {"python": str(HERE / "stand_in.py"), "environment": environment, "exclude": "n[1-5]"}
        return Run(tmp_path / name, config, {**PROFILE, **mine, **profile})

    return make
