"""What SLURM refuses is said in one line that names what to change: by the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from on_cluster import command

REFUSED = {
    "partition=gpu": ("cluster.partition can be one of high, train",),
    "nodes=99": ("lower cluster.nodes", "high 17"),
    "gpus_per_node=9": ("GPUs", "gpu:2"),
    "memory=900G": ("cluster.memory", "32000"),
    "cpus_per_node=100": ("cpus_per_node",),
    "exclude=n[1-17]": ("cluster.exclude",),
    "exclude=m9": ("names nodes that are not there; nodes: n[1-17]",),
    "sbatch=[--reservation=mine]": ("--reservation",),
    "sbatch=[--constraint=h100]": ("names what no node has",),
    "sbatch=[--no-such-option]": ("leave that key out of the profile",),
    "sbatch=[--begin=never]": ("sbatch refused: ",),
}


@pytest.mark.parametrize("change", REFUSED)
def test_refused(change: str, stand_in: Any) -> None:
    run = stand_in(exclude="n[1-3]", ranks_per_node=None, gpus_per_node=2)
    run.config["train"]["global_batch_size"] = 16 * 9 * 11  # fits 2 and 99 nodes
    said = run.submit(f"cluster.{change}", code=2)
    (line,) = said.splitlines()
    assert line.startswith("megatron-bit: error: sbatch refused: "), line
    assert all(part in line for part in REFUSED[change]), line
    assert not run.live()


def test_cluster_commands(cluster: Path) -> None:
    assert "cluster runs in" in command("cluster", "up", cluster, code=2)
    assert "has no node 'n99'; it has n1, n2" in command("cluster", "crash", cluster, "n99", code=2)
    assert "no cluster runs in" in command("cluster", "down", "/tmp/no-such-cluster")
    assert "its path may have" in command("cluster", "up", "/tmp/a b", code=2)
    assert "has to be 1 to 64" in command("cluster", "up", "/tmp/mc-none", "--nodes", "65", code=2)
    assert "needs a command" in command("cluster", code=2)
