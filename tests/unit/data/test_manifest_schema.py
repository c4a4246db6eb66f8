"""A manifest from somebody else: every value is looked at before anything is done with it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_trees import changed

from megatron_bit.data import manifest as module
from megatron_bit.data.manifest import FILE_NAME, Manifest, Split, load_manifest
from megatron_bit.errors import UserError

SHARD = ("splits", "train", "shards", 0)
VALUES: dict[str, tuple[tuple[Any, ...], Any, str]] = {  # where, what stands there, and what is said of it
    "negative": ((*SHARD, "tokens"), -5, "tokens = -5"),
    "half a token": ((*SHARD, "tokens"), 1.5, "tokens = 1.5"),
    "text": ((*SHARD, "tokens"), "12", "tokens = '12'"),
    "true": ((*SHARD, "tokens"), True, "tokens = True"),
    "more than the file has": ((*SHARD, "tokens"), 2**60, "cannot hold 1152921504606846976 tokens"),
    "beyond 64 bits": ((*SHARD, "tokens"), 2**70, "tokens = 1180591620717411303424"),
    "more documents than tokens": ((*SHARD, "documents"), 200, "cannot hold 200 documents"),
    "no size": ((*SHARD, "size"), 2**70, "size = "),
    "NUL": ((*SHARD, "file"), "a\0b", r"file = 'a\\x00b'"),
    "no name": ((*SHARD, "file"), {}, "file = {}"),
    "absolute": ((*SHARD, "file"), "/etc/hostname", "file = '/etc/hostname'"),
    "outside": ((*SHARD, "file"), "../x.tar", "file = '../x.tar'"),
    "hidden": ((*SHARD, "file"), "..", "file = '..'"),
    "twice": (("splits", "train", "shards", 1, "file"), "s0-000000.tar", "s0-000000.tar is listed twice"),
    "path for a digest": ((*SHARD, "sha256"), "/tmp/x", "sha256 = '/tmp/x'"),
    "line behind a digest": ((*SHARD, "sha256"), "a" * 64 + "\n", "sha256 = "),
    "path for a sidecar's": ((*SHARD, "lengths_sha256"), "../x", "lengths_sha256 = '../x'"),
    "a key more": ((*SHARD, "more"), 1, "more = 1"),
    "no vocabulary": (("vocab_size",), -1, "vocab_size = -1"),
    "an empty one": (("vocab_size",), 0, "a vocabulary of 0"),
    "more than the type holds": (("vocab_size",), 2**16 + 1, "a vocabulary of 65537 as uint16"),
    "more than any": (("vocab_size",), 2**40, "vocab_size = "),
    "end outside": (("eos_id",), 1000, "eos_id 1000 is outside the vocabulary of 1000"),
    "tokenizer outside": (("tokenizer", "file"), "../../etc/hostname", "tokenizer.file = "),
    "no tokenizer": (("tokenizer", "file"), "", "without a tokenizer"),
    "path for its digest": (("tokenizer", "sha256"), "/tmp/x", "tokenizer.sha256 = '/tmp/x'"),
    "identity": (("identity",), [1], r"identity = \[1\]"),
    "not finite": (("identity",), {"a": [float("nan")]}, "finite"),
    "dtype": (("dtype",), "float32", "dtype = 'float32'"),
    "dtype of records": (("dtype",), "uint8", "dtype 'uint8' of tokens"),
    "records as tokens": (("raw_bits",), 8, "records of 8 bits as uint16"),
    "bits": (("raw_bits",), 257, "raw_bits = 257"),
    "dropped": (("dropped",), {"empty": -1}, "dropped.empty = -1"),
    "another split": (("splits",), {"../x": {"shards": []}}, r"splits.../x"),
    "no splits": (("splits",), {}, "splits = {}"),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values_that_mean_nothing(name: str, make_data) -> None:
    manifest = make_data([100, 90])
    where, value, said = VALUES[name]
    path = manifest.folder / FILE_NAME
    path.write_text(json.dumps(changed(json.loads(path.read_text()), where, value)))
    with pytest.raises(UserError, match=said) as error:
        load_manifest(manifest.folder)
    assert f"{path} is damaged" in str(error.value)
    assert "\n" not in str(error.value) and "\0" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize("text", ['{"a":' * 100_000 + "1" + "}" * 100_000, "[" * 10**6, "\xff", "nan", "", '{"a":1}x'])
def test_what_is_no_json(text: str, make_data) -> None:
    path = make_data([100]).folder / FILE_NAME
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"manifest\.json is (no valid JSON|damaged)"):
        load_manifest(path.parent)


def test_a_manifest_has_a_largest_size(make_data) -> None:
    path = make_data([100]).folder / FILE_NAME
    with open(path, "r+b") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="are the most"):
        load_manifest(path.parent)


def test_what_is_right_stays_right(make_data) -> None:
    """Of before, without the newer keys; shards that are links into another folder; a vocabulary that fills its type"""
    manifest: Manifest = make_data([100, 90])
    path = manifest.folder / FILE_NAME
    content = json.loads(path.read_text())
    for key in ("code_sha256", "dropped"):
        del content[key]
    for shard in content["splits"]["train"]["shards"]:
        del shard["lengths_sha256"]
    path.write_text(json.dumps(content))
    assert load_manifest(manifest.folder).fingerprint == manifest.fingerprint
    shutil.copytree(manifest.folder, manifest.folder.parent / "elsewhere")
    for shard in manifest.splits["train"].shards:
        manifest.shard_path(shard).unlink()
        manifest.shard_path(shard).symlink_to(manifest.folder.parent / "elsewhere" / shard.file)
    assert load_manifest(manifest.folder).splits["train"].tokens == 190
    largest = dataclasses.replace(manifest, vocab_size=2**16, eos_id=2**16 - 1)
    path.write_text(largest.to_json())
    assert load_manifest(manifest.folder).vocab_size == 2**16
    path.write_text(dataclasses.replace(manifest, splits={"train": Split(())}).to_json())
    assert load_manifest(manifest.folder).splits["train"].tokens == 0


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def test_any_value_anywhere_is_read_or_refused(make_data, tmp_path: Path) -> None:
    """The fingerprint would refuse nearly all of it: what comes behind it is tried too."""
    folder = make_data([100, 90]).folder
    good = json.loads((folder / FILE_NAME).read_text())
    everywhere = [place for place in places(good) if place]

    @settings(deadline=None, max_examples=400)
    @given(st.sampled_from(everywhere), JUNK)
    def one(where: tuple[Any, ...], value: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.Manifest, "fingerprint", good["fingerprint"])
            (folder / FILE_NAME).write_text(json.dumps(changed(good, where, value)))
            try:
                manifest = load_manifest(folder)
                manifest.to_json()
            except UserError as error:
                assert "\n" not in str(error)

    one()
