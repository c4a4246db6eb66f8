"""`bench data`: what it compares reads the same tokens, and every figure is there."""

import json

import numpy as np
import pytest
from mbit_data.prepare import PrepareOptions, prepare

from megatron_bit.bench import data as job
from megatron_bit.data.stream import read_shard
from megatron_bit.errors import UserError

pytestmark = pytest.mark.slow


def test_the_contenders_read_the_same_tokens(tmp_path):
    import json as module
    from pathlib import Path

    source = str(Path(module.__file__).parent)
    options = PrepareOptions((source,), tmp_path / "data", vocab_size=400, workers=1, shard_tokens=9000)
    manifest = prepare(options, progress=False)
    tokens = np.concatenate([read_shard(manifest, shard) for shard in manifest.split("train").shards])
    np.save(tmp_path / "tokens.npy", tokens)
    documents = np.concatenate(list(job._webdataset(manifest, tmp_path / "tokens.npy")))
    np.testing.assert_array_equal(documents, tokens)
    rows = {row.tobytes() for row in tokens[: len(tokens) // 1024 * 1024].reshape(-1, 1024).astype(np.int64)}
    mapped = [row.tobytes() for batch in job._memory_map(manifest, tmp_path / "tokens.npy") for row in batch]
    assert len(set(mapped)) == len(mapped) == len(rows) // job.BATCH * job.BATCH > 0 and set(mapped) <= rows
    whole = {
        row.tobytes()
        for shard in manifest.split("train").shards
        for row in read_shard(manifest, shard)[: shard.tokens // 1024 * 1024].reshape(-1, 1024).astype(np.int64)
    }
    ours = [row.tobytes() for batch in job._ours(manifest, tmp_path / "tokens.npy") for row in batch]
    assert len(set(ours)) == len(ours) == len(whole) // job.BATCH * job.BATCH > 0 and set(ours) <= whole


def test_one_run_has_every_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job, "MANY", 40)
    assert job.main(("stdlib",), 1, None, (1,), 1, True) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["stream"]["tokens_per_cpu_second"]) == {"stream", "webdataset", "memory map"}
    assert result["stream"]["ratio"]["webdataset"]["median"] > 0
    assert [case["data"] for case in result["fresh"]][:2] == ["10 small shards", "40 small shards"]
    assert all(0 < case["resume_seconds"] < 5 and case["memory_mb"] >= 0 for case in result["fresh"])
    assert "tokenizer alone" in result["prepare"]["results"]
    empty = tmp_path / "empty.txt"
    empty.write_text(" ")
    with pytest.raises(UserError, match="no text"):
        job.main((str(empty),), 1, None, (1,), 1, True)
