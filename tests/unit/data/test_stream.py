"""Reading shards and the manifest: what is damaged is named."""

import json
import subprocess
import sys

import numpy as np
import pytest
from mbit_data.verify import verify

from megatron_bit.data.manifest import FILE_NAME, load_manifest
from megatron_bit.data.stream import ShardReader, read_documents
from megatron_bit.errors import UserError


def first_shard(manifest):
    return manifest.shard_path(manifest.split("train").shards[0])


def test_a_shard_is_its_documents_one_after_the_other(make_data):
    manifest = make_data([1000])
    tokens = ShardReader(manifest, "train", capacity=1).tokens(0)
    documents = list(read_documents(first_shard(manifest)))
    assert len(documents) == 3
    np.testing.assert_array_equal(tokens, np.concatenate(documents))
    assert tokens.dtype == np.uint16 and len(tokens) == 1000


def test_shards_are_read_whatever_the_folder_is_called(make_data):
    manifest = make_data([100], name="a#b?c {0..2} d%20")
    assert len(ShardReader(manifest, "train", capacity=1).tokens(0)) == 100


def test_ranks_in_the_environment_do_not_change_what_is_read(make_data, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert len(ShardReader(make_data([100]), "train", capacity=1).tokens(0)) == 100


@pytest.mark.parametrize("keep", [0, 100, 600, 1700, 2048, 3000])
def test_a_truncated_shard_is_named(make_data, keep):
    """At member borders tar cannot tell: there the token count of the manifest does."""
    manifest = make_data([1000])
    path = first_shard(manifest)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=path.name):
        ShardReader(manifest, "train", capacity=1).tokens(0)
    with pytest.raises(UserError, match=f"{path.name} has {keep} bytes"):
        load_manifest(manifest.folder)
    assert "truncated" in verify(manifest.folder)[0]


def test_a_token_outside_the_vocabulary_is_damage(make_data):
    manifest = make_data([1000])
    path = first_shard(manifest)
    data = bytearray(path.read_bytes())
    token = next(read_documents(path))[:20].tobytes()
    data[data.find(token) + 1] = 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"outside the vocabulary of 1000"):
        ShardReader(manifest, "train", capacity=1).tokens(0)


def test_large_vocabularies_are_uint32(make_data):
    manifest = make_data([100], dtype="uint32")
    assert ShardReader(manifest, "train", capacity=1).tokens(0).dtype == np.uint32


def test_the_manifest_comes_back_as_it_was_written(prepared):
    assert load_manifest(prepared.folder) == prepared


def test_the_fingerprint_tells_data_sets_apart(make_data):
    first, second = make_data([100, 200]), make_data([100, 201], name="other")
    assert first.fingerprint != second.fingerprint
    assert load_manifest(first.folder).fingerprint == first.fingerprint


def test_broken_manifests_are_user_errors(make_data, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_manifest(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        load_manifest(tmp_path)
    path = make_data([100]).folder / FILE_NAME
    good = json.loads(path.read_text())

    def refused(text, message):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_manifest(path.parent)

    refused("{", "JSON")
    refused("{}", "not a megatron_bit.data manifest")
    refused("[]", "the whole = .*object")
    refused(json.dumps({**good, "version": 2}), "format version 2")
    refused(json.dumps({**good, "eos_id": 7}), "edited")
    refused(json.dumps({key: value for key, value in good.items() if key != "dtype"}), "damaged.*dtype")
    path.write_text(json.dumps(good))
    first_shard(load_manifest(path.parent)).unlink()
    with pytest.raises(UserError, match=r"s0-000000\.tar cannot be opened"):
        load_manifest(path.parent)


def test_importing_needs_no_torch():
    code = "import megatron_bit.data.batches, mbit_data.prepare, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_plain_webdataset_reads_the_shards(prepared):
    """They are ordinary webdataset shards: other tools can read them without this package."""
    import webdataset

    shard = prepared.split("train").shards[0]
    samples = list(webdataset.WebDataset(str(prepared.shard_path(shard)), shardshuffle=False).decode())
    assert len(samples) == shard.documents
    assert sum(len(sample["tokens.npy"]) for sample in samples) == shard.tokens
    for sample in samples:
        assert sample["json"]["tokens"] == len(sample["tokens.npy"])
        assert (prepared.folder.parent / "corpus" / sample["json"]["source"]).stat().st_size == sample["json"]["bytes"]
