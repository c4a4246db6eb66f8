"""The hash that is recorded is of the bytes that were tokenized: an input that changes meanwhile is an error."""

import gzip
import json
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mbit_data import prepare as module
from mbit_data import raw, work
from mbit_data.array import prepare_part
from mbit_data.decompress import ChangedInput
from mbit_data.inputs import expand_inputs
from mbit_data.options import Part
from mbit_data.prepare import PrepareOptions, prepare
from mbit_data.raw import RawOptions, prepare_raw
from mbit_data.read import combine_hashes, read_documents, scan
from mbit_data.train_tokenizer import sample_texts

from megatron_bit.data.manifest import FILE_NAME
from megatron_bit.errors import UserError

CHANGED = r"^input file \S+/b\.\S+ has changed while prepare was at work; leave the inputs alone"


def grow(path):
    with open(path, "ab") as file:
        file.write(path.read_bytes())


def shrink(path):
    os.truncate(path, path.stat().st_size // 2)


def replace(path):
    """By a file of the same size and time, so that the hash alone can tell."""
    before = path.stat()
    data = path.read_bytes().replace(b"words", b"sword")
    path.with_suffix(".new").write_bytes(data[: before.st_size].ljust(before.st_size))
    os.replace(path.with_suffix(".new"), path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def rewrite(path):
    path.write_bytes(path.read_bytes())


CHANGES = [grow, shrink, replace, rewrite]
LINES = [f"document {i} with some words {'and words ' * 40}" for i in range(400)]


def plain(path):
    path.write_text("\n".join(LINES))


def lines(path):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in LINES))


def zipped(path):
    lines(path)
    path.write_bytes(gzip.compress(path.read_bytes(), 0))  # stored, so that `replace` finds its words


def columns(path):
    pq.write_table(pa.table({"text": LINES}), path, compression=None, use_dictionary=False)


FORMS = {"b.txt": plain, "b.jsonl": lines, "b.json": lines, "b.jsonl.gz": zipped, "b.parquet": columns}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("before")
    (tmp_path / "in" / "c.txt").write_text("behind")
    return tmp_path / "in"


def options(folder, prepared, **more):
    given = {"tokenizer": prepared.tokenizer_path, "validation_fraction": 0.0, "workers": 1, "shard_tokens": 2000}
    return PrepareOptions((str(folder),), folder.parent / "out", **{**given, **more})


def between(monkeypatch, target, name, path, change):
    """`change` the file right before `target.name` is called for the first time."""
    real, done = getattr(target, name), []

    def changed(*args, **kwargs):
        if not done:
            done.append(change(path))
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, changed)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FORMS)
def test_between_the_looks(folder, prepared, monkeypatch, name, change):
    path = folder / name
    FORMS[name](path)
    if change is replace and name == "b.jsonl.gz":
        pytest.skip("its own checksum finds it first")
    between(monkeypatch, module, "write_shards", path, change)
    with pytest.raises(ChangedInput, match=CHANGED):
        prepare(options(folder, prepared), progress=False)
    assert not (folder.parent / "out" / FILE_NAME).exists()
    if change is shrink:
        FORMS[name](path)
    again = prepare(options(folder, prepared), progress=False)  # and what was finished of the other text is gone
    fresh = prepare(options(folder, prepared, workers=2), progress=False)
    assert again == fresh and not list((folder.parent / "out").glob("*.jsonl"))
    files = scan(expand_inputs([str(folder)]), 1)
    assert again.identity["input_sha256"] == combine_hashes((file.source, file.sha256) for file in files)
    other = PrepareOptions(**{**options(folder, prepared).__dict__, "out": folder.parent / "other"})
    assert [s.sha256 for s in prepare(other, progress=False).split("train").shards] == [
        s.sha256 for s in again.split("train").shards
    ]


@pytest.mark.parametrize("change", [grow, shrink, rewrite])
@pytest.mark.parametrize("where", ["listing", "duplicates", "tokenizer", "hashing"])
def test_at_other_moments(folder, prepared, monkeypatch, where, change):
    path = folder / "b.jsonl"
    lines(path)
    more = {}
    if where == "listing":
        between(monkeypatch, module, "scan", path, change)
    elif where == "hashing":
        import mbit_data.read as read

        between(monkeypatch, read, "hash_file", path, change)
    elif where == "duplicates":
        between(monkeypatch, module, "write_keys", path, change)
        more = {"dedup": "exact"}
    else:
        between(monkeypatch, work, "sample_texts", path, change)
        more = {"tokenizer": None, "vocab_size": 300}
    with pytest.raises(ChangedInput, match=CHANGED):
        prepare(options(folder, prepared, **more), progress=False)


@pytest.mark.parametrize("change", CHANGES)
def test_while_it_is_read(folder, prepared, monkeypatch, change):
    """Some shards are finished by then; a start behind it makes none of them again from the text of before."""
    path = folder / "b.jsonl"
    lines(path)
    path.write_bytes(path.read_bytes() * 8)
    real = work.SplitWriter.add
    done = []

    def add(self, key, document):
        shard = real(self, key, document)
        if shard is not None and len(self._shards) == 2 and not done:
            done.append(change(path))
        return shard

    monkeypatch.setattr(work.SplitWriter, "add", add)
    if change is replace:  # the file that is open stays what it was, and its bytes are those of the hash
        right = prepare(options(folder, prepared), progress=False)
        assert right.split("train").documents == 3202
        return
    with pytest.raises(ChangedInput, match=CHANGED):
        prepare(options(folder, prepared), progress=False)
    journal = (folder.parent / "out" / "unfinished.jsonl").read_text()
    assert '"shard"' not in journal
    monkeypatch.undo()
    if change is shrink:
        lines(path)
    manifest = prepare(options(folder, prepared), progress=False)
    assert manifest.split("train").documents == 2 + path.read_bytes().count(b"\n")


def test_records_and_arrays(folder, prepared, monkeypatch):
    path = folder / "b.bin"
    path.write_bytes(os.urandom(4000))
    between(monkeypatch, raw, "_write_shards", path, replace_bytes)
    with pytest.raises(ChangedInput, match=CHANGED):
        prepare_raw(RawOptions((str(path),), folder.parent / "raw", 8), progress=False)
    path.unlink()
    path = folder / "b.txt"
    plain(path)
    import mbit_data.array as array

    between(monkeypatch, array, "write_shards", path, replace)
    with pytest.raises(ChangedInput, match=CHANGED):
        prepare_part(options(folder, prepared, part=Part(0, 1)), progress=False)


def replace_bytes(path):
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@given(st.integers(0, 3999), st.integers(1, 255), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_changed_byte_is_found(tmp_path_factory, at, other, compressed):
    path = tmp_path_factory.getbasetemp() / "b.txt"
    data = np.random.default_rng(0).integers(97, 105, 4000).astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data, 1) if compressed else data)
    if compressed:
        path = path.rename(path.with_name("b.txt.gz"))
    (file,) = scan(expand_inputs([str(path)]), 1)
    before, content = path.stat(), bytearray(path.read_bytes())
    content[at % len(content)] ^= other
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=rf"{re.escape(path.name)}"):
        list(read_documents(file))


def test_a_sample_that_ends_in_a_file_looks_at_its_time(folder):
    path = folder / "b.jsonl"
    lines(path)
    texts = sample_texts(expand_inputs([str(path)]), 10_000)
    next(texts)
    grow(path)
    with pytest.raises(ChangedInput, match=CHANGED):
        list(texts)
