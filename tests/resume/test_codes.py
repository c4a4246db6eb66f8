"""A run with a learned code: it trains, converts, and does not go on with another table."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from gloo_ranks import run_ranks
from mbit_data.codes import CodeOptions, learn
from safetensors.numpy import load_file

from megatron_bit.data.codes import load_code
from megatron_bit.data.fit import code_path
from megatron_bit.data.manifest import load_manifest
from megatron_bit.errors import UserError
from megatron_bit.inference.convert import to_hf
from megatron_bit.inference.hf_names import CODE_TABLE


def test_the_table_is_part_of_the_run(tiny_data: Path, tmp_path: Path) -> None:
    data, run = Path(shutil.copytree(tiny_data, tmp_path / "data")), tmp_path / "run"

    def train(steps: int) -> Any:
        settings = {"model.code": "semantic", "train.stop_at": steps, "model.num_layers": 1}
        return run_ranks(tiny_runs.train, 2, tiny_runs.overrides(run, data, settings))

    with pytest.raises(AssertionError, match=r"UserError: model.code=semantic needs .*megatron-bit codes .* --bits 9"):
        train(1)
    assert not (run / "identity.json").exists()
    learn(data, CodeOptions(sweeps=20), progress=False)
    assert set(train(1)) == {0}
    to_hf(run, tmp_path / "hf")
    table = load_file(tmp_path / "hf" / "model.safetensors")[CODE_TABLE]
    assert (table == load_code(load_manifest(data), 9).table).all()

    learn(data, CodeOptions(sweeps=20, seed=1), force=True, progress=False)
    with pytest.raises(AssertionError, match=r"UserError: run folder .* is of another run: code table"):
        train(2)
    with pytest.raises(UserError, match="trained with another table of codes"):
        to_hf(run, tmp_path / "other", data=str(data))
    to_hf(run, tmp_path / "other")  # the run has its own
    assert (load_file(tmp_path / "other" / "model.safetensors")[CODE_TABLE] == table).all()
    code_path(data, 9).unlink()
    with pytest.raises(UserError, match=r"semantic-9.safetensors, which is not there"):
        to_hf(run, tmp_path / "another", data=str(data))
