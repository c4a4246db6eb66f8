"""What a run takes along of its data, and paths that hold wherever it is continued."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_runs

from megatron_bit.config import Config, load_config
from megatron_bit.data.manifest import load_manifest
from megatron_bit.run.belongings import of_run, take_along
from megatron_bit.run.folder import vocabulary_of, with_absolute_paths


def _config(tiny_data: Path, *pairs: str) -> Config:
    return load_config(None, [*tiny_runs.overrides(Path("run"), tiny_data, {}), *pairs])


def test_a_run_takes_tokenizer_and_code_along(tiny_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    (data / "codes").mkdir()
    (data / "codes" / "semantic-9.safetensors").write_bytes(b"a table")
    manifest, run = load_manifest(data), tmp_path / "run"
    assert of_run(run) is None
    take_along(run, _config(data, "model.code=semantic"), manifest)
    own = of_run(run)
    assert own is not None
    shutil.rmtree(data)
    kept = load_manifest(own, check_files=False)
    assert kept.fingerprint == manifest.fingerprint
    assert kept.checked_tokenizer_path().read_bytes() == (tiny_data / "tokenizer.model").read_bytes()
    assert (own / "codes" / "semantic-9.safetensors").read_bytes() == b"a table"
    checkpoint = run / "checkpoints" / "step-00000001"
    assert vocabulary_of(_config(data), checkpoint) == str(own)
    assert vocabulary_of(_config(tiny_data), tmp_path / "other" / "checkpoints" / "step-00000001") == str(tiny_data)


def test_what_is_whole_is_not_written_again(tiny_data: Path, tmp_path: Path) -> None:
    manifest, run = load_manifest(tiny_data), tmp_path / "run"
    take_along(run, _config(tiny_data), manifest)
    files = {path: path.stat().st_mtime_ns for path in (run / "tokenizer").iterdir()}
    assert {path.name for path in files} == {"manifest.json", "tokenizer.model"}
    (run / "tokenizer" / "tokenizer.model").write_bytes(b"damaged")
    take_along(run, _config(tiny_data), manifest)
    for path, before in files.items():
        assert (path.stat().st_mtime_ns == before) is (path.name != "tokenizer.model")
    assert load_manifest(run / "tokenizer", check_files=False).checked_tokenizer_path()


@pytest.mark.parametrize("start", [None, "there", "org/model"])
def test_paths_of_a_run_are_absolute(start: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    pairs = [
        "data.path=a",
        "data.remote.cache=c",
        "checkpoint.mirror=m",
        *([f"train.init_from={start}"] if start else []),
    ]
    config = with_absolute_paths(load_config(None, pairs))
    assert (config.data.path, config.data.remote.cache) == (str(tmp_path / "a"), str(tmp_path / "c"))
    assert config.checkpoint.mirror == str(tmp_path / "m")
    assert config.train.init_from == (str(tmp_path / "there") if start == "there" else start)
    far = load_config(None, ["data.sources=[{path: 's3://b/x'}, {path: b}]", "checkpoint.mirror=s3://b/run"])
    far = with_absolute_paths(far)
    assert far.data.folders == ("s3://b/x", str(tmp_path / "b")) and far.checkpoint.mirror == "s3://b/run"
    assert with_absolute_paths(load_config(None, ["data.path=pipe:cat {file}"])).data.path == "pipe:cat {file}"
