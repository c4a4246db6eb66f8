"""Runs that are struck at random until they have ended, and what came of them.

    python -m kill.campaign --faults 1000 --seed 1 --out DIR        from tests/, or `make kill N=1000`

A trial is one run of a random layout: it is started, struck, perhaps damaged, started again, up to three times, and
then left to end. It has to end with the bits of the same run that was left alone.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import tiny_runs
from kill import compare, faults, ranks
from kill.jobs import Job, mean
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

MINUTES = 0.2  # parallel.timeout_minutes: what a rank that does not answer costs
PATIENCE = 60 * MINUTES + 40.0  # seconds in which whatever was struck has ended by itself
COLUMNS = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
FINDINGS = 20  # then a campaign ends
STARTS = 8  # of a run that is left alone, until it has ended: several ranks may be heard of too late on a busy machine

COMMON = {
    "train.steps": 8,
    "train.global_batch_size": 4,
    "model.num_layers": 2,
    "model.hidden_size": 16,
    "model.ffn_hidden_size": 24,
    "model.head.hidden_size": 16,
    "model.head.ffn_hidden_size": 24,
    "checkpoint.every": 1,
    "checkpoint.keep": 3,
    "evaluate.every": 3,
    "evaluate.samples": 4,
    "log.every": 3,
    "parallel.timeout_minutes": MINUTES,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"parallel.zero_stage": 0, "log.to": ["tensorboard"]}),
    "one_zero1_mirror": (1, {"parallel.zero_stage": 1, "checkpoint.mirror": "MIRROR"}),
    "dp2_zero0": (2, {"parallel.zero_stage": 0, "checkpoint.every": 2, "optim.spike_guard": 3.0}),
    "dp2_zero1_mirror": (2, {"parallel.zero_stage": 1, "checkpoint.mirror": "MIRROR", "log.to": ["tensorboard"]}),
    "dp2_zero2_bf16": (2, {"parallel.zero_stage": 2, "train.precision": "bf16"}),
    "dp2_zero3": (2, {"parallel.zero_stage": 3, "checkpoint.background": False}),
    "tp2_ema": (2, {"parallel.tp": 2, "parallel.zero_stage": 0, "optim.ema_decay": 0.9}),
    "pp2_zero1_measured": (2, {"parallel.pp": 2, "parallel.zero_stage": 1, "diffusion.noise": "entropy_rate",
                               "diffusion.noise_warmup": 1}),
    "dp3_chain": (3, {"model.head.kind": "chain", "train.global_batch_size": 3, "checkpoint.initial": True}),
    "tp2_pp2": (4, {"parallel.tp": 2, "parallel.pp": 2, "checkpoint.every": 2}),
    "tp2_dp2_zero3": (4, {"parallel.tp": 2, "parallel.zero_stage": 3}),
}  # fmt: skip


class Trials:
    """The trials of one process. Its disk, if it may mount one, is gone with it."""

    def __init__(self, data: Path, out: Path, scratch: Path) -> None:
        self._data, self._out = data, out
        self._said = Path(tempfile.mkdtemp(dir=scratch))  # output of the jobs: never on the full disk
        self._root = Path(tempfile.mkdtemp(dir=scratch))
        self.own_disk = _mount(self._root)
        self._whole: dict[str, tuple[Path, dict[str, float]]] = {}

    def _arguments(self, layout: str, folder: Path) -> list[str]:
        settings = {**COMMON, **LAYOUTS[layout][1]}
        if "checkpoint.mirror" in settings:
            settings["checkpoint.mirror"] = (folder / "mirror").as_uri()
        folder.mkdir(exist_ok=True)
        file = folder / "tiny.yaml"
        file.write_text("train: {steps: 8}\n")
        return [str(file), *tiny_runs.overrides(folder / "run", self._data, settings)]

    def _left_alone(self, layout: str) -> tuple[Path, dict[str, float]]:
        """The folder of an undisturbed run of a layout, and how long its moments take on the average (seconds)."""
        if layout not in self._whole:
            folder = self._root / f"whole-{layout}"
            job = Job(LAYOUTS[layout][0], self._arguments(layout, folder), self._said / f"whole-{layout}")
            ended = job.ended(time.monotonic() + 4 * PATIENCE)
            codes = job.finish()
            assert ended and set(codes) == {0}, f"{layout}, left alone: {codes}\n{job.said()}"
            lengths = job.lengths()
            self._whole[layout] = folder, {moment: mean(lengths[moment], 0.5) for moment in lengths}
            for moment in ranks.MOMENTS:
                if not lengths[moment] and moment != "shutdown":
                    self._whole[layout][1].pop(moment)  # this layout has no mirror
        return self._whole[layout]

    def trial(self, seed: int) -> dict[str, Any]:
        """One run; returns its faults, and what is wrong with it in the end ("problems")."""
        draw = random.Random(seed)
        layout = draw.choice(list(LAYOUTS))
        world_size = LAYOUTS[layout][0]
        whole, lengths = self._left_alone(layout)
        folder = self._root / f"trial-{seed}"
        arguments = self._arguments(layout, folder)
        result: dict[str, Any] = {"seed": seed, "layout": layout, "faults": [], "damages": [], "problems": []}
        kinds = [kind for kind in faults.STRIKES if kind != "disk full" or self.own_disk]
        begin = time.monotonic()
        for number in range(draw.randint(1, 3)):
            fault = faults.draw(draw, world_size, list(lengths), kinds)
            job = Job(world_size, arguments, self._said / f"start-{seed}-{number}")
            struck = self._strike(fault, job, lengths[fault.moment], result)
            if struck:
                result["faults"].append([fault.kind, fault.moment, _who(fault.victims, world_size)])
            if fault.damage:
                done = faults.damage(fault.damage, folder / "run", draw)
                result["damages"] += [done] if done else []
            if result["problems"]:
                break
        for number in range(STARTS if not result["problems"] else 0):
            job = Job(world_size, arguments, self._said / f"end-{seed}-{number}")
            ended = job.ended(time.monotonic() + 2 * PATIENCE)
            codes = job.finish()
            result["problems"] += compare.complaints(job.said(), codes)
            if not ended:
                result["problems"].append("the last start did not end")
            if set(codes) == {0}:
                mirror = folder / "mirror" if (folder / "mirror").exists() else None
                result["problems"] += compare.differences(folder / "run", whole / "run", mirror)
                break
            if set(codes) - {87, 1, -9}:  # a rank that was heard of too late is tried again, anything else is a finding
                result["problems"].append(f"a start that was left alone ends with {codes}")
            if result["problems"]:
                break
        else:
            result["problems"] = result["problems"] or [f"not ended in {STARTS} starts"]
        result["seconds"] = round(time.monotonic() - begin, 1)
        if result["problems"]:
            kept = self._out / f"trial-{seed}"
            shutil.copytree(folder, kept, symlinks=True, dirs_exist_ok=True)
            for said in self._said.glob(f"*-{seed}-*"):
                shutil.copytree(said, kept / said.name, dirs_exist_ok=True)
        for said in (folder, *self._said.glob(f"*-{seed}-*")):
            shutil.rmtree(said)
        return result

    def _strike(self, fault: faults.Fault, job: Job, length: float, result: dict[str, Any]) -> bool:
        """Wait for the moment, strike, and see how the job ends; whether it was struck before it had ended."""
        watched = fault.victims[0]
        if fault.moment == "mirror":
            watched = 0
        count = 1 if fault.moment in ("start", "shutdown") else fault.count
        struck = job.until(watched, fault.moment, count, time.monotonic() + PATIENCE)
        if struck:
            time.sleep(fault.at * length)
            struck = bool(job.alive())
        if struck:
            faults.strike(fault, job, self._root)
        deadline = time.monotonic() + PATIENCE
        if fault.agent and job.ended(deadline, every=False):  # torchrun tells the others
            job.ended(time.monotonic() + 0.5)
            faults.tell(job)
        stopped = fault.victims if struck and fault.kind == "stop for good" else []
        while job.alive() and set(job.alive()) - set(stopped) and time.monotonic() < deadline:
            job.ended(time.monotonic() + 0.1)
        late = sorted(set(job.alive()) - set(stopped))
        codes = job.finish()
        result["codes"] = sorted({*result.get("codes", []), *codes})
        problems = compare.complaints(job.said(), codes)
        if late:
            problems.append(f"ranks {late} did not end in {PATIENCE:.0f} s after {fault}")
        result["problems"] += [f"{problem} ({fault.kind} at {fault.moment}, {job.output.name})" for problem in problems]
        return struck


def _who(victims: list[int], world_size: int) -> str:
    return "all ranks" if len(victims) == world_size else "one rank"


def _mount(folder: Path) -> bool:
    """A small disk of this process's own at `folder`, which the kernel takes back; whether that is allowed."""
    new_mounts = 0x00020000  # CLONE_NEWNS of sched.h
    if os.geteuid() or ctypes.CDLL(None, use_errno=True).unshare(new_mounts):
        return False
    for command in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", "size=256m", "mbit", folder]):
        if subprocess.run(command, check=False, capture_output=True).returncode:
            return False
    return True


# ---------------------------------------------------------------- many of them
_trials: Trials | None = None


def _begin(data: Path, out: Path, scratch: Path) -> None:
    global _trials
    _trials = Trials(data, out, scratch)


def _one(seed: int) -> dict[str, Any]:
    assert _trials is not None
    try:
        return _trials.trial(seed)
    except Exception:
        return {"seed": seed, "faults": [], "damages": [], "problems": [traceback.format_exc()], "layout": "?"}


def campaign(
    count: int, seeds: Iterator[int], data: Path, out: Path, workers: int, show: bool = False
) -> list[dict[str, Any]]:
    """Trials until `count` faults have struck; their results are appended to OUT/trials.jsonl as they come.

    Args:
        seeds: one for each trial; `from_seed` gives many.
        workers: trials at a time.
    """
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="mbit-kill-") as scratch,
        ProcessPoolExecutor(workers, spawn, _begin, (data, out, Path(scratch))) as pool,
        open(out / "trials.jsonl", "a", encoding="utf-8") as file,
        Progress(*COLUMNS, console=Console(stderr=True), disable=not show) as bar,
    ):
        task, struck = bar.add_task("faults", total=count), 0
        running = {pool.submit(_one, seed) for seed in itertools.islice(seeds, workers)}
        while running:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for result in (future.result() for future in ended):
                results.append(result)
                file.write(json.dumps(result) + "\n")
                file.flush()
                struck += len(result["faults"])
                bar.update(task, completed=struck)
                if result["problems"]:
                    bar.console.print(json.dumps(result), markup=False, highlight=False)
                if struck < count and sum(bool(r["problems"]) for r in results) < FINDINGS:
                    running |= {pool.submit(_one, seed) for seed in itertools.islice(seeds, 1)}
    return results


def from_seed(seed: int) -> Iterator[int]:
    """Seeds of trials, others for each seed."""
    return itertools.count(seed * 1_000_000)


def table(results: list[dict[str, Any]]) -> str:
    """How many faults of each kind struck at which moment, as a table of Markdown."""
    counts = Counter((f"{kind}, {who}", moment) for r in results for kind, moment, who in r["faults"])
    rows = sorted({row for row, _ in counts}, key=lambda row: (faults.STRIKES.index(row.rsplit(", ", 1)[0]), row))
    lines = [f"| fault | {' | '.join(ranks.MOMENTS)} |", "|---" * (1 + len(ranks.MOMENTS)) + "|"]
    lines += [f"| {row} | {' | '.join(str(counts[row, m]) for m in ranks.MOMENTS)} |" for row in rows]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--faults", type=int, default=1000, help="how many have to strike")
    parser.add_argument("--seed", type=int, default=1, help="which trials: the same seed draws the same faults")
    parser.add_argument("--trial", type=int, nargs="+", help="these trials alone: the `seed` of a finding")
    parser.add_argument("--out", type=Path, default=Path("kill"), help="results, and the folders of what was found")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    options = parser.parse_args()
    data = options.out / "data"
    if not data.exists():
        tiny_runs.prepare_data(data)
    seeds = iter(options.trial) if options.trial else from_seed(options.seed)
    results = campaign(options.faults, seeds, data, options.out, options.workers, show=True)
    found = [result for result in results if result["problems"]]
    struck, damages = sum(len(r["faults"]) for r in results), Counter(d for r in results for d in r["damages"])
    print(f"\n{len(results)} runs of {len({r['layout'] for r in results})} layouts, {struck} faults, "
          f"{sum(damages.values())} damages, {len(found)} findings\n\n{table(results)}\n\n{dict(damages)}")  # fmt: skip
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
