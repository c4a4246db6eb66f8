"""Imported by every Python of a job whose PYTHONPATH has this folder: the real trainer, watched and disturbed.

Every rank appends what it trains on to RUN/consumed/rank-00000.jsonl, a line a step. MBIT_TEST_PACE: seconds that a
step takes longer, in the first attempt, the second and so on: 5,5,0. MBIT_TEST_HANG=1@7: rank 1 hangs in step 7, once.
MBIT_TEST_CRASH=NAME@7: the last rank of the run in the folder NAME fails in step 7, once.
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from pathlib import Path


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "megatron_bit.training.trainer":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def both(module):
            execute(module)
            _watch(module.Trainer)

        spec.loader.exec_module = both
        return spec


def _watch(trainer_class):
    plain, rank = trainer_class.train_step, int(os.environ["RANK"])
    paces, hang = os.environ["MBIT_TEST_PACE"].split(","), os.environ.get("MBIT_TEST_HANG", "")
    crash = os.environ.get("MBIT_TEST_CRASH", "")
    pace = float(paces[min(int(os.environ["MBIT_ATTEMPT"].partition(".")[2]), len(paces) - 1)])

    def train_step(self, batches):
        run, step = Path(self.config.run), self.state.step + 1
        time.sleep(pace)
        if hang == f"{rank}@{step}" and not (run / "hung-once").exists():
            (run / "hung-once").touch()
            while True:
                time.sleep(1)  # planted_hang
        if (
            crash == f"{run.name}@{step}"
            and rank == int(os.environ["WORLD_SIZE"]) - 1
            and not (run / "crashed").exists()
        ):
            (run / "crashed").touch()
            raise RuntimeError("planted_crash")
        plain(self, batches)
        folder = run / "consumed"
        folder.mkdir(exist_ok=True)
        samples = [batch.sample.tolist() for batch in batches]
        with open(folder / f"rank-{rank:05d}.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "samples": samples}) + "\n")

    trainer_class.train_step = train_step


if "RANK" in os.environ:
    sys.meta_path.insert(0, _Finder())
