"""The parts that ranks write of a checkpoint, and the rank that waits for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megatron_bit.checkpoint.save import Snapshot, write_rank
from megatron_bit.run import checkpoints as folders


def test_a_part_may_be_committed_at_the_moment_that_it_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rank 0 is quicker than the rank that has written last: for that one nothing has gone wrong."""
    temporary, final = tmp_path / "step-00000001.tmp", tmp_path / "step-00000001"
    temporary.mkdir()
    part = Snapshot({"w/param/0": torch.arange(3.0)}, {"w": {"shape": [3], "states": {}}})
    write_rank(temporary, 0, part)
    plain = os.replace

    def replace(source: Path, target: Path) -> None:
        plain(source, target)
        if Path(target).name == "rank-00001.json":
            index, files = folders.join(temporary, 2, lambda: False)
            folders.commit(temporary, final, index, files, {"step": 1})

    monkeypatch.setattr(os, "replace", replace)
    write_rank(temporary, 1, part)
    assert (final / "COMMITTED").exists() and not temporary.exists()
    assert {"rank-00000.safetensors", "rank-00001.safetensors"} <= {path.name for path in final.iterdir()}
