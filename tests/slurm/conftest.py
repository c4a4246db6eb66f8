"""One SLURM cluster for all tests that need one, and runs on it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

sys.path.insert(0, str(Path(__file__).parent))  # for on_cluster, which only these tests share

from on_cluster import HERE, LONG, NODES, STEPS, MakeRun, Run, all_but

REQUIRED = "MBIT_REQUIRE_SLURM"  # set by .ci/run: there a cluster that cannot be started is a failure


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """The folder of a cluster with twelve nodes; SLURM_CONF is set to it. It ends with this process, however that does.

    n1, n2: one run has them for itself. n3 to n5: tests crash them. n8, n9: preempted. n10 to n12: one is called bad.
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
        os.environ["SLURM_CONF"] = str(minicluster.up(folder, nodes=NODES, gpus=2, with_parent=True))
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


@pytest.fixture(scope="session")
def stand_in(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """stand_in(mode, steps, profile keys) -> a run whose trainer is stand_in.py: no torch, a step takes 0.2 s."""
    data = tmp_path_factory.mktemp("no") / "data"
    data.mkdir()
    (data / "manifest.json").write_text("{}")

    def make(mode: str = "", steps: int = 12, name: str = "run", **profile: Any) -> Run:
        config = {
            "preset": "laptop",
            "data": {"path": str(data)},
            "train": {"steps": steps, "global_batch_size": 16},
            "checkpoint": {"every": 5},
        }
        environment = {"REAL_PYTHON": sys.executable, "STAND_IN": mode}
        mine = {"python": str(HERE / "stand_in.py"), "environment": environment, "exclude": all_but("n6", "n7")}
        return Run(tmp_path_factory.mktemp("stand-in") / name, config, {**PROFILE, **mine, **profile})

    return make


@pytest.fixture(scope="session")
def real(cluster: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """real(name, environment, profile keys, settings) -> a tiny run of TP=2 x DP=2."""
    root = tmp_path_factory.mktemp("real")

    def make(
        name: str, settings: dict[str, Any] | None = None, pace: float | str = 0.0, hang: str = "", **profile: Any
    ) -> Run:
        tree = {
            "parallel.tp": 2,
            "train.steps": STEPS,
            "train.micro_batch_size": 2,
            "checkpoint.every": 5,
            "checkpoint.keep": 100,
            "log.every": 1,
            "data.path": str(tiny_data),
            **(settings or {}),
        }
        environment = {"PYTHONPATH": str(HERE / "inject"), "MBIT_TEST_PACE": str(pace), "MBIT_TEST_HANG": hang}
        keys = {"partition": "train", "nodes": 2, "ranks_per_node": 2, "time": "30", "save_seconds": 60}
        mine = {"python": sys.executable, "environment": environment, "preflight": {"min_free_gib": "0.1"}}
        config: dict[str, Any] = {}
        for key, value in {**tiny_runs.SETTINGS, **tree}.items():
            *sections, leaf = key.split(".")
            node = config
            for section in sections:
                node = node.setdefault(section, {})
            node[leaf] = value
        return Run(root / name, config, {**keys, **mine, "exclude": all_but("n6", "n7"), **profile})

    return make


@pytest.fixture(scope="session", autouse=True)
def limited(request: pytest.FixtureRequest) -> Run | None:
    """A run that meets its time limit twice, in the background of the other tests: SLURM looks every 30 s.

    It is started with the first test of this folder, whichever that is; None if its own test is not to run.
    """
    if not any(item.name == "test_a_time_limit_met_twice" for item in request.session.items):
        return None
    real = request.getfixturevalue("real")
    # USR1 comes 60 to 90 s after the start: less than 20 steps each of the first two attempts, the rest in the third
    long = {"train.steps": LONG, "checkpoint.every": 1000}
    run = real("limited", long, pace="5,5,0", time="2", save_seconds=30, exclude=all_but("n1", "n2"))
    run.submit()
    return run
