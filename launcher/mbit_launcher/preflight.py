"""Is a node fit to train on? Asked of every node before an attempt; without torch, so that it takes a second.

    python -m mbit_launcher.preflight node SUBMISSION ATTEMPT TIME      on each node: writes preflight-NODE.json
    python -m mbit_launcher.preflight judge SUBMISSION ATTEMPT NODES    exit code 1: a node is bad

TIME is the time at which the job started the tasks, by the clock of the node that runs the job's script. Whether the
ranks reach each other, and how fast, they say themselves when they have met: `parallel/links.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mbit_launcher.attempts import BAD_NODES
from mbit_launcher.profile import ClusterProfile
from mbit_launcher.submission import Submission

_QUERY = ("index", "memory.used", "ecc.errors.uncorrected.volatile.total")


def inspect(run: Path, gpus: int, started: float) -> dict[str, Any]:
    """What this node has: plain data for `judge`."""
    report: dict[str, Any] = {
        "late": time.time() - started,
        "free": {str(place): shutil.disk_usage(place).free for place in (run, Path(tempfile.gettempdir()))},
    }
    if gpus:
        report["gpus"] = nvidia_smi()
    return report


def nvidia_smi() -> list[dict[str, str]] | str:
    """A dictionary of _QUERY for each GPU that this job sees, or why there is none to ask."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError:
        return "" if _other_vendor() else "nvidia-smi is not there"
    except subprocess.TimeoutExpired:
        return "nvidia-smi has not answered for 60 s"
    if done.returncode:
        return f"nvidia-smi failed: {' '.join((done.stdout + done.stderr).split())[-200:]}"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(_QUERY, row, strict=True)) for row in rows]


def _other_vendor() -> bool:
    return Path("/dev/kfd").exists()  # AMD: nothing to ask here


def problems(reports: Mapping[str, dict[str, Any] | None], profile: ClusterProfile) -> dict[str, str]:
    """What is wrong with each bad node. `reports` has None for a node that said nothing."""
    said = {node: report for node, report in reports.items() if report is not None}
    usual = statistics.median_low([report["late"] for report in said.values()]) if said else 0.0
    found = {}
    for node, report in reports.items():
        wrong = "did not answer" if report is None else _wrong(report, profile, usual)
        if wrong:
            found[node] = wrong
    return found


def _wrong(report: Mapping[str, Any], profile: ClusterProfile, usual: float) -> str:
    check = profile.preflight
    skew = report["late"] - usual
    if abs(skew) > check.max_clock_skew_seconds:
        return f"clock is {skew:+.0f} s off"
    for place, free in report["free"].items():
        if free < check.min_free_gib * 2**30:
            return f"{free / 2**30:.1f} GiB free in {place}, less than {check.min_free_gib:g}"
    gpus = report.get("gpus")
    if isinstance(gpus, str):
        return gpus
    if gpus is not None:
        if len(gpus) < profile.gpus_per_node:
            return f"{len(gpus)} of {profile.gpus_per_node} GPUs"
        for gpu in gpus:
            used, errors = gpu["memory.used"], gpu["ecc.errors.uncorrected.volatile.total"]
            if used.isdigit() and int(used) > check.max_gpu_memory_mib:
                return f"GPU {gpu['index']} is not idle: {used} MiB are in use"
            if errors.isdigit() and int(errors):
                return f"GPU {gpu['index']} has had {errors} uncorrectable memory errors"
    return ""


def judge(submission: Submission, attempt: str, nodes: Sequence[str]) -> int:
    """Read what the nodes have said, name the bad ones, and cordon them unless all are bad alike."""
    profile, logs = submission.profile(), submission.logs / attempt
    reports = {node: _report(logs / f"preflight-{node}.json") for node in nodes}
    bad = problems(reports, profile)
    if not bad:
        print(f"preflight: {len(nodes)} nodes are fit: {', '.join(nodes)}", flush=True)
        return 0
    text = "; ".join(f"node {node}: {wrong}" for node, wrong in bad.items())
    # what all nodes share is no node's fault: a full file system, a profile that asks too much, Python not found
    shared = len(bad) == len(nodes) and (len(nodes) > 1 or None in reports.values())
    if shared:
        text += "; all nodes alike, so none is excluded"
    else:
        cordon = submission.cordon(profile)
        for node, wrong in bad.items():
            _cordon(cordon, node, wrong)
        text += f"; excluded from now on by {cordon}"
    (logs / BAD_NODES).write_text(text + "\n")
    print(f"preflight: {text}", flush=True)
    return 1


def cordoned(path: Path) -> list[str]:
    """The nodes in a cordon file: the first word of each line; # begins a comment. UserError if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    words = [line.partition("#")[0].split() for line in lines]
    return list(dict.fromkeys(word[0] for word in words if word))


def _cordon(path: Path, node: str, why: str) -> None:
    if node in cordoned(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:  # short lines in append mode: runs that share it do not mix
        file.write(f"{node}  # {time.strftime('%Y-%m-%d %H:%M:%S')} {why}\n")


def _report(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def main(what: str, folder: str, attempt: str, last: str) -> int:
    submission = Submission(Path(folder))
    if what == "judge":
        return judge(submission, attempt, last.split(","))
    report = inspect(submission.run, submission.profile().gpus_per_node, float(last))
    path = submission.logs / attempt / f"preflight-{os.environ['SLURMD_NODENAME']}.json"
    path.write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
