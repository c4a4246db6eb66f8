"""The cluster itself: it never outlives what it belongs to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from on_cluster import command


@pytest.fixture
def folder(cluster: Path) -> Iterator[Path]:
    from mbit_launcher import minicluster

    with tempfile.TemporaryDirectory(prefix="mc-", dir="/tmp") as name:
        yield Path(name) / "c"
        minicluster.down(Path(name) / "c")


def _processes(folder: Path) -> list[str]:
    """Command lines of what belongs to a cluster."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SLURM_CONF={folder}/slurm.conf" in path.read_text(errors="replace"):
                found.append((path.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return [line for line in found if "slurm" in line or "munged" in line]


def _gone(folder: Path) -> bool:
    deadline = time.monotonic() + 10
    while _processes(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not _processes(folder)


def test_it_ends_with_the_process_that_it_was_started_for(folder: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from mbit_launcher.minicluster import up\n"
        "up(Path(sys.argv[1]), nodes=1, with_parent=True); print('up', flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "up\n"
    assert any("slurmctld" in line for line in _processes(folder))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert _gone(folder), _processes(folder)


def test_up_twice_and_down_twice(folder: Path) -> None:
    said = command("cluster", "up", folder, "--nodes", "2")
    assert f"export SLURM_CONF={folder}/slurm.conf" in said
    environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
    srun = ["srun", "--nodes=2", "hostname"]
    done = subprocess.run(srun, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert sorted(done.stdout.split()) == ["n1", "n2"]
    ping = ["scontrol", "ping"]
    for what, state in (("crash", "DOWN"), ("boot", "UP")):  # the controller alone: the cluster does not end with it
        command("cluster", what, folder, "slurmctld")
        deadline = time.monotonic() + 20
        while f"is {state}" not in subprocess.run(ping, env=environment, capture_output=True, text=True).stdout:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert "a cluster runs in" in command("cluster", "up", folder, code=2)
    assert "ended" in command("cluster", "down", folder)
    assert _gone(folder), _processes(folder)
    assert "no cluster runs" in command("cluster", "down", folder)
    assert "2 nodes are up" in command("cluster", "up", folder, "--nodes", "2")  # its old files do not matter
