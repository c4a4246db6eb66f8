"""lm-evaluation-harness with our models in it: the same numbers as `evaluate`'s. Needs the extra `eval`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_bit.errors import UserError
from megatron_bit.evaluation import tasks
from megatron_bit.evaluation.harness import registered
from megatron_bit.evaluation.loading import open_model
from megatron_bit.evaluation.progress import Progress
from megatron_bit.evaluation.scoring import score
from megatron_bit.evaluation.task_files import Item

lm_eval = pytest.importorskip("lm_eval")

ITEMS = [
    Item("def f(x):\n    return", (" x", " self.assertEqual(1, 2)", " None"), 0),
    Item("import", (" os", " numpy as np and more"), 1),
    Item("class A:\n    def __init__(self", ("):", ", other):\n        pass"), 0),
    Item("for i in", (" range(10):", " x"), 0),
]


def write_tasks(folder: Path) -> None:
    rows = [{"context": i.context, "choices": list(i.choices), "label": i.label} for i in ITEMS]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test", "doc_to_text": "{{context}}", "target_delimiter": "",
    }  # fmt: skip
    kinds: dict[str, dict[str, Any]] = {
        "choose": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}"},
        "whole": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{context}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "write": {
            "output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 7}, "metric_list": [{"metric": "exact_match"}],
        },
    }  # fmt: skip
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **kind}))


@pytest.mark.parametrize("name", ["chain", "names", "odd"])
def test_it_says_what_evaluate_says(name: str, converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    write_tasks(tmp_path)
    run = converted[name].run
    found = lm_eval.simple_evaluate(
        model=registered()(str(run), batch_size=3), tasks=["choose", "whole", "write"], bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )  # fmt: skip
    ours = open_model(run)
    ranking = tasks.rank("choose", ours, ITEMS, seed=0, batch_size=2)
    costs = tasks.costs("choose", ours, ITEMS, seed=0, batch_size=2)
    samples = {kind: sorted(some, key=lambda s: s["doc_id"]) for kind, some in found["samples"].items()}
    theirs = [[-float(answer[0][0]) for answer in sample["resps"]] for sample in samples["choose"]]
    if ours.exact:  # a bound's noise has the number of the text as its key, and there all choices of an item have one
        assert found["results"]["choose"]["acc,none"] == ranking.accuracy
        for mine, other in zip(costs, theirs, strict=True):
            assert other == pytest.approx(mine, rel=1e-4)
    rows = [ours.encode(item.context) for item in ITEMS]
    nats = score(ours, rows, seed=0, batch_size=1, progress=Progress("whole"))
    for mine, sample in zip(nats, samples["whole"], strict=True):
        assert -sample["resps"][0][0] == pytest.approx(mine.sum().item(), rel=1e-4)
    for sample in samples["write"]:
        assert "\n" not in sample["resps"][0][0]
    if ours.head == "chain":
        (text,) = samples["write"][0]["resps"][0]
        made = ours.generate([rows[0]], 7, [0], 0, {"temperature": 0.0})[0]
        assert ours.decode([*rows[0], *made])[len(ours.decode(rows[0])) :].split("\n")[0] == text


def test_its_command_line(converted: Any, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    command = [
        sys.executable, "-m", "megatron_bit.evaluation.harness", "--model", "megatron_bit", "--model_args",
        f"pretrained={converted['chain'].run}", "--tasks", "choose", "--include_path", str(tmp_path),
        "--batch_size", "2",
    ]  # fmt: skip
    env = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|choose" in done.stdout and "acc" in done.stdout
    command[6] = f"pretrained={tmp_path / 'none'}"
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 2 and "is not a folder" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"batch_size": "auto"}, "--batch_size auto has to be a whole number of at least 1"),
        ({"seed": "x"}, "seed x has to be a whole number"),
        ({"weights": "best"}, "weights=best is not known; give trained or ema"),
        ({"dtype": "bfloat16"}, "dtype is not known"),
    ],
)
def test_arguments_that_mean_nothing(given: dict[str, str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        registered()(str(tmp_path), **given)
