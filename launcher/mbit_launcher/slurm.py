"""SLURM's commands, and what their refusals mean for the user. Never a shell; every call has a time-out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mbit_launcher.silence import Silent, silent
from megatron_bit.errors import UserError

TIMEOUT_SECONDS = 60
LIVE = (
    "PENDING",
    "RUNNING",
    "SUSPENDED",
    "CONFIGURING",
    "COMPLETING",
    "REQUEUED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
)


@dataclass(frozen=True)
class Job:
    """A line of squeue."""

    id: str  # 12, or 12_3 for task 3 of an array
    state: str
    left: str  # time until its limit
    reason: str  # why it waits
    nodes: str


class Refused(UserError):
    """SLURM said no; `said` is its last line."""

    def __init__(self, message: str, said: str) -> None:
        super().__init__(message)
        self.said = said


def call(*command: str) -> str:
    """What a command of SLURM prints.

    Raises:
        UserError: it is not installed.
        Silent: it has had no answer; what it was to do may have been done.
        Refused: SLURM said no.
    """
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{command[0]} of SLURM is not on PATH: call this on a login node of the cluster (perhaps `module load "
            "slurm`), or start a small cluster here with `megatron-bit cluster up DIR`"
        )
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise Silent(f"{command[0]} has not answered for {TIMEOUT_SECONDS} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        said = re.sub(rf"^{command[0]}: (error: )?", "", lines[-1])
        if silent(" ".join(lines)):
            raise Silent(f"{command[0]} has had no answer ({said})")
        raise Refused(_meaning(command[0], " ".join(lines), said), said)
    return done.stdout


def sbatch(script: Path, token: str, *options: str) -> str:
    """Submit; returns the job's number. The script gets `token` as its argument. UserError says what to change."""
    return call("sbatch", "--parsable", *options, str(script), token).strip().split(";")[0]


def queued(token: str) -> list[str]:
    """Numbers of your jobs that were submitted with `token` in their comment or as their argument, oldest first.

    Those that have ended are among them for a while. Of an array it is the array's. Raises as `call`.
    """
    mine = ("--noheader", "--states=all", f"--user={os.getuid()}", "--format=%F|%k|%o")
    found = {line.partition("|")[0].strip() for line in call("squeue", *mine).splitlines() if token in line}
    return sorted(found, key=lambda job: int(job) if job.isdecimal() else 0)


def jobs(ids: Iterable[str]) -> dict[str, Job]:
    """Those of these jobs that SLURM still queues or runs, by number; of an array every task by itself.

    Raises as `call`: that SLURM does not answer is no reason to take them for ended.
    """
    wanted = sorted(set(ids))
    if not wanted:
        return {}
    found = {}
    fields = ("%i", "%T", "%L", "%r", "%N")
    for line in _queue(wanted, "|".join(fields)):
        parts = line.split("|")
        if len(parts) == len(fields) and parts[1] in LIVE:
            found[parts[0]] = Job(*parts)
    return found


def _queue(ids: Sequence[str], fields: str) -> list[str]:
    try:
        return call("squeue", "--noheader", "--array", f"--jobs={','.join(ids)}", f"--format={fields}").splitlines()
    except Refused as error:
        if "Invalid job id" not in error.said:  # what squeue says of one job alone that it has forgotten
            raise
        return []


def ended(ids: Iterable[str]) -> dict[str, str]:
    """How jobs have ended, by number, where the cluster keeps accounts; nothing where it does not."""
    wanted = sorted(set(ids))
    if not wanted or shutil.which("sacct") is None:
        return {}
    try:
        options = ("--allocations", "--noheader", "--parsable2", "--format=JobID,State")
        lines = call("sacct", *options, f"--jobs={','.join(wanted)}")
    except UserError:  # "Slurm accounting storage is disabled"
        return {}
    return {parts[0]: parts[1] for line in lines.splitlines() if len(parts := line.split("|")) == 2}


def scancel(ids: Sequence[str]) -> None:
    """End jobs; those that have ended already do not matter. Raises as `call`."""
    call("scancel", "--quiet", *ids)


# words of SLURM's message: what to change, and what of sinfo shows the possible values
_ADVICE: tuple[tuple[str, str, str], ...] = (
    (
        "violates",
        "a limit of your account or QoS is reached (`sacctmgr show qos`, `squeue --me`): lower cluster.nodes or "
        "cluster.time, or wait until jobs have ended",
        "",
    ),
    ("invalid partition", "cluster.partition can be one of", "%R"),
    ("invalid account", "set cluster.account to one of yours (`sacctmgr show associations user=$USER`)", ""),
    ("invalid qos", "set cluster.qos to one of your account's (`sacctmgr show qos`)", ""),
    ("reservation", "a --reservation in cluster.sbatch is not there, or not yours (`scontrol show reservation`)", ""),
    ("time limit", "lower cluster.time; the longest of each partition:", "%R %l"),
    ("invalid feature", "a --constraint in cluster.sbatch names what no node has; nodes have", "%f"),
    ("node count", "lower cluster.nodes; nodes of each partition:", "%R %D"),
    ("processors", "lower cluster.nodes or cluster.cpus_per_node; partition, nodes, cores of a node:", "%R %D %c"),
    (
        "generic resource",
        "cluster.gpus_per_node asks for GPUs that are not there; GPUs of each partition's nodes:",
        "%R %G",
    ),
    ("memory specification", "lower cluster.memory; MiB of each partition's nodes:", "%R %m"),
    (
        "node configuration",
        "no node has all of what cluster.nodes, gpus_per_node, cpus_per_node and memory ask for, without those in "
        "cluster.exclude and the cordon file; partition, nodes, cores, MiB and GPUs:",
        "%R %D %c %m %G",
    ),
    ("invalid node name", "cluster.exclude or the cordon file names nodes that are not there; nodes:", "%N"),
    ("unrecognized option", "this SLURM is too old for it: leave that key out of the profile", ""),
    ("configuration file", "this machine belongs to no cluster: set SLURM_CONF, or call this on a login node", ""),
    ("establish", "this machine belongs to no cluster: set SLURM_CONF, or call this on a login node", ""),
    (
        "quota",
        "the disk quota is used up: remove checkpoints (`megatron-bit checkpoint rm`) or choose another run=",
        "",
    ),
)


def _meaning(command: str, text: str, said: str) -> str:
    """One line for the user: what SLURM said, and what to change."""
    for words, advice, fields in _ADVICE:
        if words in text.lower():
            return f"{command} refused: {said}; {advice}{_choices(fields)}"
    return f"{command} refused: {said}"


def _choices(fields: str) -> str:
    """What sinfo prints by a format, in one line; nothing if it cannot be asked."""
    if not fields:
        return ""
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", f"--format={fields}"], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return " " + ", ".join(sorted({" ".join(line.split()) for line in done.stdout.splitlines()}))
