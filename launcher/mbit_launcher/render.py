"""The sbatch script of a submission: a header and settings made from the profile, then job.sh as it is."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from mbit_launcher.profile import ClusterProfile
from mbit_launcher.silence import WORDS
from mbit_launcher.submission import Submission
from megatron_bit.errors import UserError

LAST_CALL = 0.8  # of save_seconds: from SLURM's signal to giving up on the save


def render(
    profile: ClusterProfile, submissions: Sequence[Submission], log: Path, cordoned: Sequence[str], requeue: bool = True
) -> str:
    """The script for one submission, or for several as tasks of a job array.

    Args:
        log: of the script; %j, %A and %a stand in its name for the job, the array and the task.
        cordoned: nodes to leave out besides those of the profile.
        requeue: whether the job goes back into the queue; without, the next of a chain goes on.

    Raises:
        UserError: a path that SLURM or bash could misunderstand.
    """
    first = submissions[0]
    check_path(first.run)
    exclude = ",".join([*([profile.exclude] if profile.exclude else []), *cordoned])
    name = f"{first.run.name}-sweep" if len(submissions) > 1 else first.run.name
    header: list[tuple[str, object]] = [
        ("job-name", name),
        ("partition", profile.partition),
        ("account", profile.account),
        ("qos", profile.qos),
        ("nodes", profile.nodes),
        ("ntasks-per-node", 1),
        ("cpus-per-task", profile.cpus_per_node),
        ("gpus-per-node", profile.gpus_per_node or None),
        ("mem", profile.memory),
        ("exclusive", profile.exclusive or None),
        ("exclude", exclude or None),
        ("switches", profile.switches),
        ("segment", profile.segment),
        ("time", profile.time),
        ("signal", f"B:USR1@{profile.save_seconds}"),
        ("requeue" if requeue else "no-requeue", True),
        ("array", f"0-{len(submissions) - 1}" if len(submissions) > 1 else None),
        ("open-mode", "append"),
        ("export", "NONE"),
        ("chdir", first.run),
        ("output", log),
    ]
    lines = ["#!/bin/bash", f"# Made by `megatron-bit submit` on {time.strftime('%Y-%m-%d %H:%M:%S')}."]
    lines += [_option(key, value) for key, value in header if value is not None]
    lines += [f"#SBATCH {_sbatch_word(word)}" for word in profile.sbatch]
    lines += ["", *_environment(profile)]
    container = []
    if profile.container is not None:
        container = [f"--container-image={profile.container.image}"]
        if profile.container.mounts:
            container += [f"--container-mounts={','.join(profile.container.mounts)}"]
        container += profile.container.options
    python = profile.python or (sys.executable if profile.container is None else "python3")
    folders = [str(s.folder) for s in submissions]
    lines += [
        f"submission={shlex.quote(folders[0])}",
        *([f"submissions=({shlex.join(folders)})"] if len(folders) > 1 else []),
        f"python={shlex.quote(python)}",
        f"ranks_per_node={profile.ranks}",
        f"last_call={round(LAST_CALL * profile.save_seconds)}  # seconds that a save may take after SLURM's signal",
        f"requeue={int(requeue)}",
        f"limit_seconds={seconds(profile.time)}",
        f"silence={shlex.quote(WORDS)}",
        f"preflight_seconds={profile.preflight.timeout_seconds if profile.preflight.enabled else 0}",
        f"cordon={shlex.quote(str(first.cordon(profile)))}",
        f"exclude={shlex.quote(profile.exclude or '')}",
        f"container=({shlex.join(container)})",
        f"srun_options=({shlex.join(profile.srun)})",
        "",
    ]
    return "\n".join(lines) + "\n" + resources.files("mbit_launcher").joinpath("job.sh").read_text()


def seconds(limit: str) -> int:
    """Of a time limit as SLURM writes it: minutes, minutes:seconds, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts.insert(0, 0)  # hours
    hours, minutes, left = [*parts, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + left


def check_path(run: Path) -> None:
    """UserError for a run folder that cannot stand in a script of SLURM."""
    if re.search(r"[\\\n\r\x00]", str(run)):
        raise UserError(
            f"run = {str(run)!r}: SLURM cannot write to a path with a backslash or a line break; choose another"
        )


def _environment(profile: ClusterProfile) -> list[str]:
    lines = [f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()]
    if profile.modules:
        lines += ["[[ $(type -t module) == function ]] || source /etc/profile"]
        lines += [f"module load {shlex.quote(module)} || exit 1" for module in profile.modules]
    return [*lines, ""] if lines else []


def _option(key: str, value: object) -> str:
    if value is True:
        return f"#SBATCH --{key}"
    text = str(value)
    if key == "output":  # %j and its like stand in the name alone
        folder, _, name = text.rpartition("/")
        text = f"{folder.replace('%', '%%')}/{name}"
    return f"#SBATCH --{key}={_sbatch_word(text)}"


def _sbatch_word(text: str) -> str:
    """As sbatch reads it in a script: double quotes keep spaces, and a backslash the next character."""
    if re.fullmatch(r"[\w@%+=:,./\[\]-]+", text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
