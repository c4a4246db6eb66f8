"""The model card of a converted folder: what it says, against what the run has recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tiny_runs
import yaml
from generation import run_card
from gloo_ranks import run_ranks

from megatron_bit.inference.convert import to_hf

SETTINGS = {"optim.ema_decay": 0.5, "train.steps": 3, "evaluate.every": 1, "checkpoint.every": 1, "log.every": 1}


def front_of(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.fixture(scope="module", params=["chain", "diffusion"])
def run(request: pytest.FixtureRequest, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    run = tmp_path_factory.mktemp("card") / "run"
    head = {"model.head.kind": request.param, "model.group_bits": 5}
    assert run_ranks(tiny_runs.train, 1, tiny_runs.overrides(run, tiny_data, {**SETTINGS, **head})) == [0]
    return request.param, run


@pytest.mark.parametrize("step", [2, 3])
def test_figures_are_the_run_s_at_the_step_of_the_checkpoint(step: int, run: tuple[str, Path], tmp_path: Path) -> None:
    kind, source = run
    to_hf(source / "checkpoints" / f"step-{step:08d}", folder := tmp_path / 'a "model"')
    recorded = [json.loads(line) for line in (source / "validation.jsonl").read_text().splitlines()]
    (there,) = (record for record in recorded if record["step"] == step)
    front, text = front_of(folder)
    (result,) = front["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == round(there["nats_per_token_bound"], 4)
    assert f"**{there['nats_per_token_bound']:.3f} +- {there['standard_error']:.3f}**" in text
    assert ("bound" in result["metrics"][0]["name"]) == (kind == "diffusion")
    assert front.get("pipeline_tag") == ("text-generation" if kind == "chain" else None)
    assert f"| trained | {step:,} steps, {there['tokens']:,} tokens |" in text
    picture = ElementTree.parse(folder / "curves.svg").getroot()
    circles = picture.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == sum(record["step"] <= step for record in recorded)
    if step == 3:
        assert run_card(folder).startswith("The ")


def test_averaged_weights_have_no_figure_of_others(run: tuple[str, Path], tmp_path: Path) -> None:
    """Validation is of the weights that are trained."""
    to_hf(run[1], folder := tmp_path / "model", weights="ema")
    front, text = front_of(folder)
    assert "model-index" not in front and "Validation split" not in text and "their running average" in text


def test_a_run_that_has_recorded_nothing(run: tuple[str, Path], tmp_path: Path) -> None:
    """Of its first checkpoint alone, without logs."""
    _, source = run
    alone = tmp_path / "run"
    (alone / "checkpoints").mkdir(parents=True)
    for part in ("checkpoints/step-00000001", "tokenizer"):
        (alone / part).symlink_to(source / part)
    to_hf(alone, folder := tmp_path / "model")
    front, text = front_of(folder)
    assert "model-index" not in front and "curves" not in text and not (folder / "curves.svg").exists()
