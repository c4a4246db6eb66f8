"""What can happen to a job: the faults, and how each of them strikes."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kill.jobs import Job

from megatron_bit.run.checkpoints import complete, problems

STRIKES = ("kill", "terminate", "terminate, kill", "stop", "stop for good", "disk full", "file too large")
DAMAGES = ("flip", "cut", "empty", "delete", "torn log", "litter")
SPARED = 1 << 14  # bytes that a full disk still takes


@dataclass(frozen=True)
class Fault:
    kind: str  # of STRIKES
    moment: str  # of ranks.MOMENTS
    count: int  # at which of them
    victims: list[int]
    at: float  # in lengths of the moment, from its begin
    lasts: float  # seconds: a stop, a full disk, the time from SIGTERM to SIGKILL
    agent: bool  # whether the others are told as torchrun does it (SIGTERM) when a rank has ended
    damage: str  # of DAMAGES, done to the run when the job has ended; or empty


def draw(random_: random.Random, world_size: int, moments: list[str], kinds: list[str]) -> Fault:
    """A fault at random."""
    kind = random_.choice(kinds)
    whole = kind == "disk full" or random_.random() < 0.4
    everybody = list(range(world_size))
    victims = everybody if whole else [random_.randrange(world_size)]
    if kind == "stop for good":  # of all ranks nobody would be left to say so
        victims = [random_.randrange(world_size)]
    return Fault(
        kind,
        random_.choice(moments),
        random_.randint(1, 4),
        victims,
        random_.random() * 1.2,
        random_.choice((0.02, 0.2, 1.0)) * random_.random() * 2,
        random_.random() < 0.5,
        random_.choice(DAMAGES) if random_.random() < 0.35 else "",
    )


def strike(fault: Fault, job: Job, disk: Path) -> None:
    """Do it. What lasts a while is over when this returns, but for "stop for good"."""
    if fault.kind == "kill":
        job.signal(fault.victims, signal.SIGKILL)
    elif fault.kind in ("terminate", "terminate, kill"):
        job.signal(fault.victims, signal.SIGTERM)
        if fault.kind == "terminate, kill":
            job.ended(time.monotonic() + fault.lasts)
            job.signal(job.alive(), signal.SIGKILL)
    elif fault.kind in ("stop", "stop for good"):
        job.signal(fault.victims, signal.SIGSTOP)
        if fault.kind == "stop":
            job.ended(time.monotonic() + fault.lasts)
            job.signal(fault.victims, signal.SIGCONT)
    elif fault.kind == "disk full":
        filler = disk / "filler"
        room = shutil.disk_usage(disk).free - SPARED
        with open(filler, "wb") as file, suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(1, room))
        job.ended(time.monotonic() + fault.lasts)
        filler.unlink()
    elif fault.kind == "file too large":
        _limit(job, fault.victims, SPARED)
        job.ended(time.monotonic() + fault.lasts)
        _limit(job, fault.victims, resource.RLIM_INFINITY)
    else:
        raise AssertionError(fault.kind)


def tell(job: Job) -> None:
    """SIGTERM to the ranks that are left, as torchrun does when one has ended."""
    job.signal(job.alive(), signal.SIGTERM)


def _limit(job: Job, victims: list[int], limit: int) -> None:
    for rank in victims:
        pid = job.pid(rank)
        if pid is not None:
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def damage(kind: str, run: Path, random_: random.Random) -> str:
    """Damage a run that nobody works on, such that an undamaged checkpoint is left; returns what was done."""
    if kind == "torn log":  # behind what the newest checkpoint has seen; before it, nothing could be done again
        names = [name for name in ("log.jsonl", "validation.jsonl") if (run / name).exists()]
        names += [str(path.relative_to(run)) for path in sorted((run / "tensorboard").glob("*"))[-1:]]
        if not names:
            return ""
        path = run / random_.choice(names)
        with open(path, "ab") as file:
            file.write(b'{"step": 5, "tokens": 1\xff'[: random_.randint(1, 24)])
        return f"torn {path.name.split('.')[0]}"
    if kind == "litter":
        root = run / "checkpoints"
        if not root.is_dir():
            return ""
        for name in ("step-00000003.tmp", "step-00000099.tmp", "step-00000002.deleted", "step-00000001.1.tmp"):
            (root / name).mkdir(exist_ok=True)
            (root / name / "rank-00000.safetensors").write_bytes(b"\0" * 100)
        for path in (run / "heartbeats").glob("*"):
            path.write_bytes(b"{half")
        (run / "lock").write_bytes(b"")
        return "litter"
    undamaged = [folder for folder in complete(run / "checkpoints") if not problems(folder)]
    if len(undamaged) < 2:
        return ""
    folder = undamaged[-1]
    names = sorted(path.name for path in folder.iterdir())
    ranks = [name for name in names if name.startswith("rank-")]
    chosen = random_.choice((ranks, [random_.choice(names)]))  # of all ranks, or one file
    for name in chosen:
        path = folder / name
        data = bytearray(path.read_bytes())
        if kind == "delete":
            path.unlink()
        elif kind == "empty":
            path.write_bytes(b"")
        elif kind == "cut":
            path.write_bytes(data[: random_.randrange(len(data))])
        else:
            data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
            path.write_bytes(data)
    return f"{kind} {'all ranks' if chosen is ranks else chosen[0]}"
