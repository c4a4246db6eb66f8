"""The time model against steps that others published. Run as a program it prints the table of docs/planning.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_bit.config import Config, load_config
from megatron_bit.parallel.dims import ParallelDims
from megatron_bit.planning.hardware import load_hardware
from megatron_bit.planning.search import Cluster, search
from megatron_bit.planning.times import Overlap, step_time

PUBLISHED = yaml.safe_load((Path(__file__).parents[2] / "published_runs.yaml").read_text())
RUNS = PUBLISHED["runs"]
H100 = load_hardware("h100")


def configuration(run: dict[str, Any], batch: int) -> Config:
    settings = {
        "model.head.kind": "softmax", "model.block_size": 1, "model.qk_norm": False,
        "data.seq_length": run["seq_length"], "train.micro_batch_size": run["micro_batch_size"],
        "train.global_batch_size": batch, **{f"parallel.{key}": value for key, value in run["parallel"].items()},
        **{f"model.{key}": value for key, value in run["shape"].items()},
    }  # fmt: skip
    config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
    train = config.train.model_copy(update={"precision": run.get("precision", "bf16")})
    return config.model_copy(update={"train": train})


def errors(run: dict[str, Any]) -> list[tuple[int, float]]:
    """(GPUs, predicted over measured - 1) of every step."""
    found = []
    for gpus, batch, measured in run["steps"]:
        config = configuration(run, batch)
        overlap = Overlap(tensor=run["overlap"], gradients=run["overlap"])
        predicted = step_time(config, ParallelDims.build(config, gpus), H100, 8, overlap).total
        found.append((gpus, predicted / measured - 1))
    return found


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_error_of_published_steps(run: dict[str, Any]) -> None:
    """Megatron in bf16 within 12 % (calibrated on two of ten rows, within 6 %); FP8 within 14 %; FSDP of 2023 is up to
    31 % slower than predicted."""
    megatron = "Megatron" in run["name"]
    for gpus, error in errors(run):
        if gpus in run.get("fit", ()):
            assert abs(error) < 0.06
        elif megatron:
            assert abs(error) < (0.14 if run.get("precision") == "fp8" else 0.12)
        else:
            assert -0.32 < error < 0.0


def test_the_calibration_is_the_best_for_its_rows() -> None:
    """Of the efficiencies in steps of a hundredth, the shipped one has the smallest largest error."""

    def worst(efficiency: float) -> float:
        hardware = H100.model_copy(update={"matmul_efficiency": {**H100.matmul_efficiency, "bf16": efficiency}})
        largest = 0.0
        for run in RUNS:
            for gpus, batch, measured in run["steps"]:
                if gpus in run.get("fit", ()):
                    config, overlap = configuration(run, batch), Overlap(tensor=True, gradients=True)
                    seconds = step_time(config, ParallelDims.build(config, gpus), hardware, 8, overlap).total
                    largest = max(largest, abs(seconds / measured - 1))
        return largest

    steps = [round(0.5 + 0.01 * i, 2) for i in range(40)]
    best = min(steps, key=worst)
    assert abs(best - H100.matmul_efficiency["bf16"]) < 0.011


def strong_scaling() -> list[tuple[int, float, float, float]]:
    """(GPUs, published MFU, predicted with nothing hidden, and with all communication hidden) in the best layouts."""
    run = PUBLISHED["strong_scaling"]
    found = []
    for gpus, published in run["points"]:
        cluster = Cluster(H100, gpus // 8, 8)
        best = [
            search(configuration(run, run["batch"]), cluster, overlap).candidates[0].mfu
            for overlap in (Overlap(), Overlap(tensor=True, gradients=True))
        ]
        found.append((gpus, published, best[0], best[1]))
    return found


def test_strong_scaling_lies_between() -> None:
    """What is published is better than with nothing hidden, and worse than with all of it."""
    for _, published, least, most in strong_scaling():
        assert least < published < most
        assert published / least < 1.14 and most / published < 1.26


def table() -> str:
    lines = ["| model | GPUs | measured, s | predicted, s | error | |", "|---|---|---|---|---|---|"]
    for run in RUNS:
        for (gpus, _, measured), (_, error) in zip(run["steps"], errors(run), strict=True):
            fit = "calibrated on" if gpus in run.get("fit", ()) else ""
            cells = f"{gpus:,} | {measured:.3f} | {measured * (1 + error):.3f} | {100 * error:+.1f} % | {fit}"
            lines.append(f"| {run['name']} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
    for gpus, published, least, most in strong_scaling():
        print(f"175B on {gpus:,} GPUs: MFU {published:.1%}; predicted {least:.1%} (nothing hidden) to {most:.1%} (all)")
