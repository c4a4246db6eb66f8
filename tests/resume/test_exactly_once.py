"""Killed again and again and continued with another data-parallel size: no sample twice, none left out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from gloo_ranks import run_ranks

STEPS, BATCH = 14, 12
SMALL = {
    "model.num_layers": 1,
    "data.shuffle_shards": 2,
    "train.steps": STEPS,
    "train.global_batch_size": BATCH,
    "checkpoint.every": 1,
    "checkpoint.keep": 3,
}


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small folders of one tokenizer, in a few shards each: some 60 and 30 samples of 36 tokens."""
    import textwrap

    from mbit_data.prepare import PrepareOptions, prepare

    folder = tmp_path_factory.mktemp("two")
    lines = [line for line in Path(textwrap.__file__).read_text().splitlines() if line.strip()]
    for name, chosen in (("a", lines[::2]), ("b", lines[1::4])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in chosen))
    a = PrepareOptions((str(folder / "a.jsonl"),), folder / "a", vocab_size=421, shard_tokens=700, workers=1)
    first = prepare(a, progress=False)
    b = PrepareOptions(
        (str(folder / "b.jsonl"),), folder / "b", tokenizer=first.tokenizer_path, shard_tokens=500, workers=1
    )
    prepare(b, progress=False)
    return [folder / "a", folder / "b"]


def _arguments(run: Path, folders: list[Path], workers: int) -> list[str]:
    arguments = tiny_runs.overrides(run, folders[0], {**SMALL, "data.prefetch": workers})
    if len(folders) > 1:
        sources = json.dumps([{"path": str(f), "weight": w} for f, w in zip(folders, (2, 1), strict=True)])
        arguments = [a for a in arguments if not a.startswith("data.path=")]
        arguments += [f"data.sources={sources}", "data.align_blocks=true", "data.document_boundaries=mask"]
    return arguments


def _read(records: Path) -> dict[int, dict[int, Any]]:
    """Step to sample index to tokens, over all ranks."""
    steps: dict[int, dict[int, Any]] = {}
    for line in records.read_text().splitlines():
        step, rows = json.loads(line)
        for samples, tokens in rows:
            here = steps.setdefault(step, {})
            assert not here.keys() & set(samples), "two ranks have one sample"
            here.update(zip(samples, tokens, strict=True))
    return steps


@pytest.mark.parametrize("mixed", [False, True], ids=["one folder", "mixture"])
def test_killed_at_random_and_continued_at_any_size(two_folders: list[Path], tmp_path: Path, mixed: bool) -> None:
    folders = two_folders if mixed else two_folders[:1]
    run_ranks(tiny_runs.train_recorded, 1, _arguments(tmp_path / "whole", folders, 2), tmp_path / "whole.jsonl", None)
    expected = _read(tmp_path / "whole.jsonl")
    assert sorted(i for step in expected.values() for i in step) == list(range(STEPS * BATCH))
    chance, reached, died = random.Random(mixed), 0, []
    sizes = [2, 3, 1, 6, 4]
    for number, ranks in enumerate(sizes):
        last = number == len(sizes) - 1
        die_at = None if last else min(STEPS - 1, reached + chance.randint(1, 4))
        records = tmp_path / f"{number}.jsonl"
        arguments = _arguments(tmp_path / "run", folders, chance.randint(1, 3))
        try:
            run_ranks(tiny_runs.train_recorded, ranks, arguments, records, die_at)
            assert last
        except AssertionError as error:
            assert "died without a result" in str(error)
        found = _read(records) if records.exists() else {}
        begun = {step: samples for step, samples in found.items() if len(samples) == BATCH}
        assert all(expected[step] == samples for step, samples in begun.items())
        if begun:
            assert min(begun) <= reached, "samples were left out"
            reached = max(begun) + 1
        died.append(die_at)
    assert reached == STEPS and len(set(died)) > 3
    once = [str(tokens) for step in expected.values() for tokens in step.values()]
    if not mixed:  # over an epoch border into the middle of the second epoch, of the same samples in another order
        epoch = next(i for i in range(1, len(once)) if once[i] in once[:i] and len(set(once[:i])) == i)
        assert 36 < epoch < 140 and set(once[epoch:]) <= set(once[:epoch]) and once[epoch:] != once[: len(once) - epoch]
