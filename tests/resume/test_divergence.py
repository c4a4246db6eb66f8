"""A run whose updates are skipped again and again ends, or goes back; what was good is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from gloo_ranks import end_ranks, run_ranks

from megatron_bit.run.checkpoints import complete, problems

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "zero1": (2, {"parallel.zero_stage": 1}),
    "zero3": (2, {"parallel.zero_stage": 3}),
    "tp2_pp2": (4, {"parallel.tp": 2, "parallel.pp": 2}),
}
BAD = (8, 16)  # samples of steps 5 to 8
SETTINGS = {
    "train.global_batch_size": 2, "train.steps": 12, "checkpoint.every": 2, "checkpoint.keep": 1, "log.every": 1,
    "optim.max_skipped": 3,
}  # fmt: skip


def _train(run: Path, data: Path, world: int, **settings: Any) -> None:
    arguments = tiny_runs.overrides(run, data, {**SETTINGS, **settings})
    assert set(run_ranks(tiny_runs.train_poisoned, world, arguments, *BAD)) == {0}


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_stops_and_keeps_what_was_good(name: str, tiny_data: Path, tmp_path: Path) -> None:
    """Step 4 was saved, and the loss of its weights was no number: only that of step 2 was seen to be finite."""
    world, layout = LAYOUTS[name]
    run = tmp_path / "run"
    with pytest.raises(AssertionError, match=r"Diverged: .*run has diverged: up to step 7 3 updates .*step-00000002; "):
        _train(run, tiny_data, world, **layout)
    assert [p.name for p in complete(run / "checkpoints")] == ["step-00000002", "step-00000004"]  # and none of step 6
    assert "step-00000002" in (run / "DIVERGED").read_text() and not (run / "FINISHED").exists()
    records = [json.loads(line, parse_constant=pytest.fail) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, 8))
    assert [r["loss"] is None for r in records] == [False] * 4 + [True] * 3


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_goes_back_and_on_behind_the_data(name: str, tiny_data: Path, tmp_path: Path) -> None:
    """To the bits of a start from that checkpoint whose cursor was set behind the data by hand."""
    world, layout = LAYOUTS[name]
    with pytest.raises(AssertionError, match="Diverged"):
        _train(tmp_path / "hand", tiny_data, world, **layout)
    shutil.rmtree(tmp_path / "hand" / "checkpoints" / "step-00000004")
    _set_cursor(tmp_path / "hand" / "checkpoints" / "step-00000002", 14)
    _train(tmp_path / "hand", tiny_data, world, **layout, **{"optim.max_skipped": 0})
    run = tmp_path / "run"
    _train(run, tiny_data, world, **layout, **{"optim.on_divergence": "rewind"})
    newest = [complete(folder / "checkpoints")[-1] for folder in (run, tmp_path / "hand")]
    for state in ("param", "exp_avg", "exp_avg_sq"):
        assert tiny_runs.worst(*(tiny_runs.read_state(folder, state) for folder in newest))[0] == 0.0
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, 13))
    assert [r.get("rewinds", 0) for r in records] == [0] * 2 + [1] * 10
    gone = [json.loads(line)["step"] for line in (run / "rolled_back.jsonl").read_text().splitlines()]
    assert gone == [3, 4, 5, 6, 7] and not (run / "DIVERGED").exists()


def _set_cursor(checkpoint: Path, samples: int) -> None:
    meta = json.loads((checkpoint / "meta.json").read_text())
    meta["state"]["samples"] = samples
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    tiny_runs.sums_anew(checkpoint)


def test_rewinds_are_counted(tiny_data: Path, tmp_path: Path) -> None:
    """Data that does not become better: it stops after the last one."""
    arguments = {**SETTINGS, "optim.on_divergence": "rewind", "optim.max_rewinds": 2, "train.steps": 40}
    with pytest.raises(AssertionError, match=r"Diverged: .*set optim.on_divergence=rewind"):
        run_ranks(tiny_runs.train_poisoned, 1, tiny_runs.overrides(tmp_path / "run", tiny_data, arguments), 8, 10**6)
    assert next(p.name for p in complete(tmp_path / "run" / "checkpoints")) == "step-00000002"
    back = json.loads((tmp_path / "run" / "rewind.json").read_text())
    assert (back["step"], back["rewinds"]) == (2, 2)


def test_never_if_it_is_switched_off(tiny_data: Path, tmp_path: Path) -> None:
    _train(tmp_path / "run", tiny_data, 1, **{"optim.max_skipped": 0})
    assert (tmp_path / "run" / "FINISHED").exists()


def _killed(run: Path, data: Path, world: int, bad: tuple[int, int], when: str, **settings: Any) -> None:
    arguments = tiny_runs.overrides(run, data, {**SETTINGS, "optim.on_divergence": "rewind", **settings})
    codes, _ = end_ranks(tiny_runs.train_poisoned_killed, world, arguments, *bad, when, 1)
    assert -9 in codes, codes


@pytest.mark.parametrize(("name", "when"), [("one", "noted"), ("one", "back"), ("one", "1"), ("zero1", "back")])
def test_a_rewind_outlives_the_process(name: str, when: str, tiny_data: Path, tmp_path: Path) -> None:
    """Killed before the next save, it goes on to the bits of a run that was not, and the count is kept. The checkpoint
    of step 4, whose weights had diverged, is not what it goes on from, and is still there."""
    world, layout = LAYOUTS[name]
    settings = {**layout, "optim.on_divergence": "rewind", "checkpoint.keep": 9}
    _train(tmp_path / "whole", tiny_data, world, **settings)
    run = tmp_path / "run"
    _killed(run, tiny_data, world, BAD, when, **settings)
    _train(run, tiny_data, world, **settings)
    newest = [complete(folder / "checkpoints")[-1] for folder in (run, tmp_path / "whole")]
    for state in ("param", "exp_avg", "exp_avg_sq"):
        assert tiny_runs.worst(*(tiny_runs.read_state(folder, state) for folder in newest))[0] == 0.0
    states = [json.loads((folder / "meta.json").read_text())["state"] for folder in newest]
    assert states[0] == states[1] and states[0]["rewinds"] == 1
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (run, tmp_path / "whole")]
    for mine, its in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert [mine[key] for key in ("step", "tokens", "loss")] == [its[key] for key in ("step", "tokens", "loss")]
    aside = run / "checkpoints" / "step-00000004.diverged-1"
    assert problems(aside) == [] and json.loads((aside / "meta.json").read_text())["state"]["rewinds"] == 0


def test_killing_it_buys_no_further_rewind(tiny_data: Path, tmp_path: Path) -> None:
    run, bad = tmp_path / "run", (8, 10**6)
    settings = {"optim.max_rewinds": 2, "train.steps": 40}
    for rewinds in (1, 2):
        _killed(run, tiny_data, 1, bad, "back", **settings)
        assert json.loads((run / "rewind.json").read_text())["rewinds"] == rewinds
    arguments = tiny_runs.overrides(run, tiny_data, {**SETTINGS, "optim.on_divergence": "rewind", **settings})
    with pytest.raises(AssertionError, match=r"Diverged: .*set optim.on_divergence=rewind"):
        run_ranks(tiny_runs.train_poisoned, 1, arguments, *bad)
    assert json.loads((run / "rewind.json").read_text())["rewinds"] == 2


def test_a_run_that_begins_anew_has_not_gone_back(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _killed(run, tiny_data, 1, BAD, "back")
    shutil.rmtree(run / "checkpoints")
    arguments = tiny_runs.overrides(run, tiny_data, {**SETTINGS, "train.steps": 4})
    assert run_ranks(tiny_runs.train, 1, arguments) == [0]
    assert json.loads((complete(run / "checkpoints")[-1] / "meta.json").read_text())["state"]["samples"] == 8
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert not (run / "rewind.json").exists()


@pytest.mark.parametrize("keep", [1, 9])
def test_the_copies_go_back_as_well(keep: int, tiny_data: Path, tmp_path: Path) -> None:
    """The way that was left is not fetched again, and is not kept behind the URL in the place of what follows."""
    run, there = tmp_path / "run", tmp_path / "there"
    settings = {"checkpoint.keep": keep, "checkpoint.mirror": f"file://{there}", "optim.on_divergence": "rewind"}
    _killed(run, tiny_data, 1, BAD, "back", **settings)
    assert (there / "step-00000004" / "COMMITTED").exists()
    _train(run, tiny_data, 1, **settings, **{"train.stop_at": 3})
    names = sorted(folder.name for folder in there.iterdir())
    assert names[-1] == "step-00000003" and (keep == 1 or "step-00000002" in names), names
    (run / "checkpoints").rename(tmp_path / "lost")
    _train(run, tiny_data, 1, **settings)
    assert json.loads((complete(run / "checkpoints")[-1] / "meta.json").read_text())["state"]["samples"] == 14 + 2 * 10
