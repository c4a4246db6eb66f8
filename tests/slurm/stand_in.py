#!/usr/bin/env python3
"""Stands in for `python` of a job: torchrun and the trainer without torch, in milliseconds; all else is the real one.

What the launcher does with SLURM does not depend on what is trained. It leaves what the trainer leaves (heartbeats,
complete checkpoints, FINISHED) and obeys the same signals. The environment variable STAND_IN says what goes wrong:
    crash@7     rank 1 raises an error in step 7, each time
    hang@7      rank 1 stops moving in step 7, the first time
    slow        does not save when it is asked to
STAND_IN_GATE is where the first attempt waits until RUN/go is there, with RUN/at-gate to say so: "attempts end", behind
this command of the launcher; "step 5", before it is done; "save", before the ranks leave that were asked to.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time

SECONDS_A_STEP = 0.2


def torchrun(words):
    """Start the ranks of this node; as torchrun, end with 1 when one of them fails."""
    options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)
    command = words[words.index("--no-python") + 1 :]
    count, first = int(options["nproc-per-node"]), int(options["node-rank"]) * int(options["nproc-per-node"])
    world = str(count * int(options["nnodes"]))
    environments = [{**os.environ, "RANK": str(first + i), "WORLD_SIZE": world} for i in range(count)]
    prctl = ctypes.CDLL(None).prctl  # ranks die with the real torchrun, too
    ranks = [
        subprocess.Popen(command, env=environment, preexec_fn=lambda: prctl(1, signal.SIGKILL, 0, 0, 0))
        for environment in environments
    ]
    signal.signal(signal.SIGTERM, lambda *_: [rank.terminate() for rank in ranks])
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            for rank in ranks:
                rank.terminate()
            time.sleep(0.5)
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)
    return int(any(rank.returncode for rank in ranks))


def train(path):
    """Steps of nothing, with everything that the launcher looks at."""
    import faulthandler
    import json
    from pathlib import Path

    signalled = []
    signal.signal(signal.SIGUSR1, lambda *_: signalled.append(1))
    faulthandler.register(signal.SIGUSR2)
    from mbit_launcher import heartbeats

    from megatron_bit.config import load_config
    from megatron_bit.run.checkpoints import newest_step, step_folder

    config = load_config(path)
    run, rank, mode = Path(config.run), int(os.environ["RANK"]), os.environ.get("STAND_IN", "")
    first = step = newest_step(run / "checkpoints")
    attempt = os.environ["MBIT_ATTEMPT"]
    asked, last = run / f"asked.{attempt}", run / f"last.{attempt}"  # some rank was asked; the step that all stop at
    beats = run / "heartbeats" / f"rank-{rank:05d}"
    beats.parent.mkdir(parents=True, exist_ok=True)

    def beat(ended=False):
        record = {
            "rank": rank,
            "host": os.environ["SLURMD_NODENAME"],
            "attempt": attempt,
            "step": step,
        }
        partial = beats.with_name(f".{beats.name}")
        partial.write_text(json.dumps({**record, "done": step - first, "time": time.time(), "ended": ended}))
        partial.replace(beats)

    def meet(ranks, at):
        """Wait until these ranks have done step `at` in this attempt: a collective."""
        while sum(b.step >= at and b.rank in ranks for b in heartbeats.read(run, attempt)) < len(ranks):
            time.sleep(0.05)

    everyone = range(int(os.environ["WORLD_SIZE"]))

    def save():
        if rank == 0:
            folder = step_folder(run / "checkpoints", step)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "COMMITTED").touch()

    beat()
    print(f"stand-in {config.run}: at step {step}", flush=True)
    while step < config.train.steps:
        meet(everyone, step)
        time.sleep(SECONDS_A_STEP)
        if rank == 1 and os.environ.get("STAND_IN_GATE") == f"step {step + 1}":
            gate(run)
        if rank == 1 and mode == f"crash@{step + 1}":
            raise RuntimeError(f"planted in step {step + 1}")
        if rank == 1 and mode == f"hang@{step + 1}" and not (run / "hung-once").exists():
            (run / "hung-once").touch()
            time.sleep(3600)
        step += 1
        if signalled:
            asked.touch()
        if rank != 1:
            meet([1], step)  # who waits for rank 1 has not done the step before it has
        elif asked.exists() and mode != "slow":
            last.touch()
        stop = last.exists()  # rank 1 goes on to another step when all have said that this one is done: all agree
        beat()
        if step % config.checkpoint.every == 0:
            save()
        if stop:
            time.sleep((1, 2, 0, 0)[rank])  # the other node has left when rank 0 writes, and its neighbour not yet
            save()
            beat(ended=True)
            if os.environ.get("STAND_IN_GATE") == "save":
                gate(run)
            return 85
    meet(everyone, step)
    save()
    if rank == 0:
        (run / "FINISHED").touch()
    beat(ended=True)
    return 0


def gate(run):
    """Wait for RUN/go, in the job's first attempt."""
    if os.environ["MBIT_ATTEMPT"].endswith(".0"):
        open(f"{run}/at-gate", "w").close()
        while not os.path.exists(f"{run}/go"):
            time.sleep(0.05)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:2] == ["-m", "torch.distributed.run"]:
        sys.exit(torchrun(words[2:]))
    real = os.environ["REAL_PYTHON"]
    if words[:3] == ["-m", "megatron_bit", "train"]:
        os.execv(real, [real, __file__, "train", words[3]])  # the packages are the real one's
    if words[:1] == ["train"]:
        sys.exit(train(words[1]))
    if " ".join(words[1:3]) == f"mbit_launcher.{os.environ.get('STAND_IN_GATE')}":
        code = subprocess.run([real, *words]).returncode
        gate(os.path.dirname(os.path.dirname(words[3])))
        sys.exit(code)
    os.execv(real, [real, *words])
