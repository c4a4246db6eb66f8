"""The softmax peer under layouts: every one trains the single process's model, over a padded vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import softmax_ranks
import tiny_runs
from gloo_ranks import run_ranks
from tiny_runs import Result

TOLERANCE = 1e-5
STEPS = 3
SOFTMAX = {
    "model.head.kind": "softmax", "model.block_size": 1, "model.memory.rows": 50, "train.steps": STEPS, "train.global_batch_size": 4,
    "train.micro_batch_size": 2, "evaluate.every": STEPS, "evaluate.samples": 4,
}  # fmt: skip

LAYOUTS = {
    "tp2_sp": (2, {"parallel.tp": 2}),
    "tp2": (2, {"parallel.tp": 2, "parallel.sequence_parallel": False}),
    "pp2": (2, {"parallel.pp": 2}),
    "dp2_zero1": (2, {"parallel.zero_stage": 1}),
    "dp2_zero2": (2, {"parallel.zero_stage": 2}),
    "tp2_dp2_zero3": (4, {"parallel.tp": 2, "parallel.zero_stage": 3}),
    "tp2_pp2_interleaved_recompute": (
        4,
        {"parallel.tp": 2, "parallel.pp": 2, "parallel.vpp": 2, "parallel.recompute": "full"},
    ),
}


def validation(run: Path) -> list[float]:
    return [json.loads(line)["nats_per_token_bound"] for line in (run / "validation.jsonl").read_text().splitlines()]


def train(world: int, run: Path, data: Path, **settings: Any) -> Result:
    arguments = tiny_runs.overrides(run, data, {**SOFTMAX, **settings})
    assert set(run_ranks(tiny_runs.train, world, arguments)) == {0}
    return tiny_runs.read(run)


@pytest.fixture(scope="module")
def single_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("single") / "run"
    train(1, run, tiny_data)
    return run


def same(run: Path, reference: Path) -> None:
    ours, theirs = tiny_runs.read(run), tiny_runs.read(reference)
    assert len(ours.loss) == STEPS
    assert ours.loss == pytest.approx(theirs.loss, abs=TOLERANCE)
    assert ours.bound == pytest.approx(ours.loss, rel=1e-6)  # exact, so one number
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    assert validation(run) == pytest.approx(validation(reference), abs=TOLERANCE)
    difference, where = tiny_runs.worst(ours.weights, theirs.weights)
    assert difference < TOLERANCE, where


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_single_process(name: str, single_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    world, settings = LAYOUTS[name]
    train(world, tmp_path / "run", tiny_data, **settings)
    same(tmp_path / "run", single_run)


def test_another_layout_continues(single_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(2, run, tiny_data, **{"parallel.tp": 2, "parallel.zero_stage": 1, "train.stop_at": 2, "evaluate.every": 2})
    train(2, run, tiny_data, **{"parallel.pp": 2})
    (run / "validation.jsonl").write_text("".join((run / "validation.jsonl").read_text().splitlines(True)[::2]))
    same(run, single_run)


def test_bf16_stays_close(single_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    train(2, tmp_path / "run", tiny_data, **{"parallel.tp": 2, "train.precision": "bf16"})
    assert tiny_runs.read(tmp_path / "run").loss == pytest.approx(tiny_runs.read(single_run).loss, rel=2e-2)


def test_a_padded_vocabulary_over_tp() -> None:
    """301 tokens, 384 rows: one process, two and three ranks compute one loss and one gradient."""

    def run(tp: int, sequence_parallel: bool) -> tuple[np.ndarray, list[float], dict[str, np.ndarray]]:
        results = run_ranks(softmax_ranks.loss_and_gradients, tp, tp, sequence_parallel)
        whole: dict[str, np.ndarray] = {}
        for name, (places, _) in results[0][2].items():
            shape = [max(r[2][name][0][i][1] for r in results) for i in range(len(places))]
            whole[name] = np.full(shape, np.nan, np.float32)
        for _, _, gradients in results:
            for name, (places, part) in gradients.items():
                whole[name][tuple(slice(*place) for place in places)] = part
        assert all(r[1] == pytest.approx(results[0][1]) for r in results)
        metrics = np.sum([r[0] for r in results], axis=0)
        return metrics / (1 if sequence_parallel else tp), results[0][1], whole

    metrics, bound, gradients = run(1, False)
    assert gradients["head.logits.weight"].shape == (384, 36)
    for tp, sequence_parallel in ((2, True), (3, True), (3, False)):
        others = run(tp, sequence_parallel)
        assert others[0] == pytest.approx(metrics, rel=1e-6) and others[1] == pytest.approx(bound, rel=1e-5)
        assert others[2].keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = np.linalg.norm(others[2][name] - gradient)
            assert error <= 1e-5 * np.linalg.norm(gradient), (tp, sequence_parallel, name)
            if name in ("embedding.table.weight", "head.logits.weight"):
                assert not gradient[301:].any() and not others[2][name][301:].any()
