"""One SLURM cluster for all tests that need one, and runs on it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import manifests
import pytest
import tiny_runs

sys.path.insert(0, str(Path(__file__).parent))  # for on_cluster, which only these tests share

from on_cluster import BACKGROUND, CHEAP, DEAR, HERE, NODES, STEPS, MakeRun, Run, Stage, all_but

REQUIRED = "MBIT_REQUIRE_SLURM"  # set by .ci/run: there a cluster that cannot be started is a failure


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """The folder of a cluster; SLURM_CONF is set to it. It ends with this process, however that does.

    n6 and n7 are for everybody; what disturbs others has nodes of its own.
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
    manifests.bare(data)

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


@pytest.fixture(scope="session")
def under_way(
    request: pytest.FixtureRequest, cluster: Path, stand_in: MakeRun, real: MakeRun
) -> Iterator[dict[str, Future[None]]]:
    """The scenarios of all selected tests, started together, by name."""
    chosen = {item.callspec.params["scenario"] for item in request.session.items if "under_way" in item.fixturenames}
    stage, started, pools = Stage(cluster, stand_in, real), {}, []
    for scenarios, workers in ((BACKGROUND, 1), (CHEAP, 4), (DEAR, 2)):
        pools.append(ThreadPoolExecutor(workers))
        started |= {name: pools[-1].submit(play, stage) for name, play in scenarios.items() if name in chosen}
    yield started
    for pool in pools:  # after Ctrl-C some still run: they end when the cluster does
        pool.shutdown(wait=False, cancel_futures=True)
