"""data.on_error=skip in real ranks: one node's damaged shard is everybody's, in the checkpoint and after a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from gloo_ranks import run_ranks

SKIP = {"data.on_error": "skip", "data.shuffle_shards": 2}


@pytest.fixture
def nodes(tiny_data: Path, tmp_path: Path) -> list[str]:
    """Two working folders with `data` in them; the second one's has a shard cut to half its length."""
    from megatron_bit.data.manifest import load_manifest
    from megatron_bit.data.order import SampleOrder

    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        shutil.copytree(tiny_data, tmp_path / name / "data")
    manifest = load_manifest(tmp_path / "bad" / "data")
    shards = manifest.split("train").shards
    length = tiny_runs.SETTINGS["data.seq_length"]
    order = SampleOrder([shard.tokens for shard in shards], seq_length=length, seed=1234, shuffle_shards=2)
    path = manifest.shard_path(shards[order.locate(0)[1]])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return [str(tmp_path / "good"), str(tmp_path / "bad")]


def _train(run: Path, folders: list[str], **settings: Any) -> list[dict[str, Any]]:
    arguments = tiny_runs.overrides(run, Path("data"), {**SKIP, **settings})
    assert set(run_ranks(tiny_runs.train_elsewhere, len(folders), arguments, folders)) == {0}
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_damage_on_one_node(nodes: list[str], tmp_path: Path) -> None:
    good, bad = nodes
    whole = _train(tmp_path / "whole", [bad])
    assert whole[-1]["replaced"] > 0
    _train(tmp_path / "run", [good, bad], **{"train.stop_at": 2})
    run = _train(tmp_path / "run", [good])  # which has nothing damaged, and goes on as the run began
    assert [r["loss"] for r in run] == pytest.approx([r["loss"] for r in whole], abs=1e-5)
    assert [r["replaced"] for r in run] == [r["replaced"] for r in whole]
    other = _train(tmp_path / "undamaged", [good])
    assert other[-1]["replaced"] == 0
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(other, whole, strict=True)) > 1e-3
