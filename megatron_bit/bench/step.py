"""`megatron-bit bench step`: what the frame costs, against a plain PyTorch loop over the same model in one run."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_bit.bench.machine import machine
from megatron_bit.bench.spread import spread
from megatron_bit.config import Config, load_config, to_yaml
from megatron_bit.errors import UserError
from megatron_bit.parallel import groups as process_groups
from megatron_bit.training.build import build
from megatron_bit.training.trainer import Trainer


def main(config: Config, steps: int, repeats: int, as_json: bool) -> int:
    """Time trainer and reference in turn; print medians, spread and the ratio pair by pair."""
    reference = _reference_module()
    if config.model.code not in ("binary", "gray") or config.train.precision != "fp32":
        raise UserError(
            "bench step compares with a plain fp32 loop: use train.precision=fp32 and model.code=binary or gray"
        )
    with tempfile.TemporaryDirectory() as folder:
        config = _settings(config, Path(folder), steps * (repeats + 1))
        with contextlib.redirect_stdout(sys.stderr):  # the trainer's progress is not the result
            result = _measure(config, reference, steps, repeats)
        result["startup"] = _startup(config, Path(folder))
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print(_table(result))
    return 0


def _reference_module() -> Any:
    path = Path(__file__).parents[2] / "tests" / "reference.py"
    if not path.exists():
        raise UserError(f"bench step compares with {path}, which only a source checkout has; run it from a clone")
    spec = importlib.util.spec_from_file_location("mbit_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _settings(config: Config, folder: Path, total: int) -> Config:
    """The given model and batch, in a run folder of its own, on given data or a small part of the standard library."""
    data: tuple[str, ...] = ()
    if not config.data.folders[0]:
        import email

        from mbit_data.prepare import PrepareOptions, prepare

        data = (f"data.path={folder / 'data'}",)
        inputs = (str(Path(email.__file__).parent),)
        prepare(PrepareOptions(inputs=inputs, out=folder / "data", vocab_size=1024, workers=1), progress=False)
    path = folder / "bench.yaml"
    path.write_text(to_yaml(config))
    return load_config(
        path,
        (
            f"run={folder / 'run'}",
            *data,
            f"train.steps={total + 1}",
            f"checkpoint.every={total + 1}",
            "parallel.tp=1",
            "parallel.pp=1",
            "parallel.vpp=1",
            "evaluate.every=0",
            "train.stop_at=null",
        ),
    )


def _measure(config: Config, reference: Any, steps: int, repeats: int) -> dict[str, Any]:
    trainer = build(config, process_groups.init(config))
    plain = reference.ReferenceTrainer(config, reference.initial_weights(config))
    batches = [
        [(torch.from_numpy(b.tokens), torch.from_numpy(b.sample)) for b in step]
        for step in itertools.islice(trainer.stream.steps(0), steps)
    ]
    for callback in trainer.callbacks:
        callback.start(trainer)
    ours = _stretch(trainer, steps)

    def theirs() -> None:
        for step in batches:
            plain.step(step)

    try:
        timings: dict[str, list[float]] = {"trainer": [], "plain loop": []}
        order: list[tuple[str, Callable[[], None]]] = [("trainer", ours), ("plain loop", theirs)]
        for run in range(repeats + 1):
            for name, stretch in order if run % 2 else order[::-1]:
                begin = time.perf_counter()
                stretch()
                if run:  # the first of each warms up
                    timings[name].append((time.perf_counter() - begin) / steps)
    finally:
        trainer.stream.close()
        for callback in trainer.callbacks:
            callback.finish(trainer)
        process_groups.shutdown()
    tokens = config.train.global_batch_size * config.data.seq_length
    ratios = [a / b for a, b in zip(timings["trainer"], timings["plain loop"], strict=True)]
    return {
        "machine": machine(),
        "steps_per_stretch": steps,
        "ms_per_step": {name: spread([1e3 * t for t in values]) for name, values in timings.items()},
        "tokens_per_second": {name: spread([tokens / t for t in values]) for name, values in timings.items()},
        "ratio": spread(ratios),
    }


def _stretch(trainer: Trainer, steps: int) -> Callable[[], None]:
    batches = trainer.stream.steps(0)

    def run() -> None:
        for _ in range(steps):
            trainer.train_step(next(batches))
            for callback in trainer.callbacks:
                callback.after_step(trainer)

    return run


def _startup(config: Config, folder: Path) -> dict[str, float]:
    """Seconds from starting a process to the end of its first step, and of importing torch alone."""
    path = folder / "startup.yaml"
    path.write_text(to_yaml(config))
    command = [sys.executable, "-m", "megatron_bit", "train", str(path), f"run={folder / 'startup'}", "train.steps=1"]
    seconds = {}
    for name, arguments in {"first step": command, "import torch": [sys.executable, "-c", "import torch"]}.items():
        begin = time.perf_counter()
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONSAFEPATH": "1"})
        seconds[name] = round(time.perf_counter() - begin, 2)
    return seconds


def _table(result: dict[str, Any]) -> str:
    lines = [result["machine"], f"{'':12} {'ms/step':>24} {'tokens/s':>26}"]
    for name in ("trainer", "plain loop"):
        ms, rate = result["ms_per_step"][name], result["tokens_per_second"][name]
        lines.append(
            f"{name:12} {ms['median']:8.1f} ({ms['min']:.1f}-{ms['max']:.1f})"
            f" {rate['median']:12.0f} ({rate['min']:.0f}-{rate['max']:.0f})"
        )
    ratio = result["ratio"]
    lines.append(
        f"trainer / plain loop, pair by pair: {ratio['median']:.3f} (median; {ratio['min']:.3f} to {ratio['max']:.3f})"
    )
    start = result["startup"]
    lines.append(
        f"process start to the end of a run of one step: {start['first step']} s "
        f"(import torch alone: {start['import torch']} s)"
    )
    return "\n".join(lines)
