"""JSON lines, Parquet and .zst: every record once, and every damaged one named or counted."""

import gzip
import json
import lzma
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from mbit_data.inputs import expand_inputs
from mbit_data.prepare import PrepareOptions, prepare
from mbit_data.read import SPLIT_ABOVE, Reading, read_documents

from megatron_bit.data.stream import read_documents as read_shard_documents
from megatron_bit.data.tokenizer import Tokenizer
from megatron_bit.errors import UserError

TEXTS = ["one\n", "zwei \u2028 drei", "\U0001f600\0", "   ", "ä" * 5000, "last"]


def read(path, **reading):
    (file,) = expand_inputs([str(path)])
    return list(read_documents(file, Reading(**reading)))


def texts(path, **reading):
    return [document.text for document in read(path, **reading)]


def write_lines(path: Path, lines: list[str | bytes]) -> Path:
    data = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    if path.suffix == ".zst":
        data, opener = zstandard.ZstdCompressor().compress(data), open
    with opener(path, "wb") as file:
        file.write(data)
    return path


def write_parquet(path: Path, values, row_group_size=4, **columns) -> Path:
    pq.write_table(pa.table({"text": values, **columns}), path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_json_lines_give_one_document_a_line(tmp_path, suffix):
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(TEXTS)]
    path = write_lines(tmp_path / f"a.jsonl{suffix}", ["\ufeff" + lines[0], *lines[1:3], "", *lines[3:]])
    documents = read(path)
    assert [document.text for document in documents] == TEXTS
    assert [document.index for document in documents] == [0, 1, 2, 4, 5, 6]  # lines, of which number 3 is blank
    assert 0 < sum(document.read_bytes for document in documents) <= path.stat().st_size


def test_the_text_key_is_an_option(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ['{"content": "x", "text": "y"}'])
    assert texts(path, text_key="content") == ["x"] and texts(path) == ["y"]
    write_parquet(tmp_path / "a.parquet", ["y"], content=["x"])
    assert texts(tmp_path / "a.parquet", text_key="content") == ["x"]


@pytest.mark.parametrize(
    "line, what",
    [
        ('{"text": "cut', "not JSON"),
        ('["text"]', "a JSON array, not an object"),
        ("null", "a JSON null, not an object"),
        ('{"txt": "x", "b": 1}', r"no key 'text' \(there: txt, b; --text-key names another\)"),
        ('{"text": null}', "'text' is null, not a string"),
        ('{"text": 5}', "'text' is a number, not a string"),
        (b'{"text": "\xff"}', r"not UTF-8 \(byte 10 of the line\)"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_damaged_line_stops_or_is_counted(tmp_path, line, what):
    path = write_lines(tmp_path / "a.jsonl", ['{"text": "good"}', line, '{"text": "too"}'])
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2: {what}.*--on-error skip"):
        texts(path)
    reading = Reading(on_error="skip")
    (file,) = expand_inputs([str(path)])
    assert [document.text for document in read_documents(file, reading)] == ["good", "too"]
    assert reading.damaged == 1 and "line 2" in reading.first_damaged


@given(st.lists(st.one_of(st.text(max_size=20).map(lambda t: {"text": t}), st.integers(), st.none()), max_size=8))
@settings(max_examples=60, deadline=None)
def test_no_record_is_lost_or_invented(tmp_path_factory, records):
    path = write_lines(tmp_path_factory.getbasetemp() / "any.jsonl", [json.dumps(record) for record in records])
    good = [record["text"] for record in records if isinstance(record, dict)]
    reading = Reading(on_error="skip")
    (file,) = expand_inputs([str(path)])
    assert [document.text for document in read_documents(file, reading)] == good
    assert reading.damaged == len(records) - len(good)


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_parquet_gives_one_document_a_row(tmp_path, kind):
    values = pa.array(TEXTS * 3, pa.string()).cast(kind) if "view" not in str(kind) else pa.array(TEXTS * 3, kind)
    path = write_parquet(tmp_path / "a.parquet", values, other=list(range(len(values))))
    documents = read(path)
    assert [document.text for document in documents] == TEXTS * 3
    assert [document.index for document in documents] == list(range(18))
    assert sum(document.read_bytes for document in documents) == path.stat().st_size


def test_a_damaged_row_stops_or_is_counted(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", pa.array(["a", None, "b", "c", "d", None]))
    with pytest.raises(UserError, match=r"a\.parquet, row 1: 'text' is null; .*--on-error skip"):
        texts(path)
    assert texts(path, on_error="skip") == ["a", "b", "c", "d"]
    path = write_parquet(tmp_path / "b.parquet", pa.array([b"a", b"\xff"]))
    with pytest.raises(UserError, match=r"b\.parquet, row 1: not UTF-8"):
        texts(path)


def test_a_parquet_file_that_cannot_be_used_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["x"], number=[1])
    with pytest.raises(UserError, match=r"no column 'body'; name one with --text-key \(there: text, number\)"):
        texts(path, text_key="body", on_error="skip")
    with pytest.raises(UserError, match="column 'number' is int64, not text"):
        texts(path, text_key="number")
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    with pytest.raises(UserError, match=r"a\.parquet is damaged"):
        texts(path)
    big = write_parquet(tmp_path / "b.parquet", [str(i) * 50 for i in range(5000)], row_group_size=1000)
    data = bytearray(big.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    big.write_bytes(data)
    with pytest.raises(UserError, match=r"b\.parquet is damaged"):
        texts(big)


def test_memory_does_not_grow_with_a_parquet_file(tmp_path):
    """One row group of 64 MB of text is read in pieces."""
    with pq.ParquetWriter(
        tmp_path / "big.parquet", pa.schema({"text": pa.string(), "waste": pa.string()}), compression=None
    ) as out:
        rows = [f"{i:09d}" * 1000 for i in range(7000)]
        out.write_table(pa.table({"text": rows, "waste": rows}), row_group_size=10_000)
    (file,) = expand_inputs([str(tmp_path / "big.parquet")])
    assert file.size > 120_000_000 and pq.read_metadata(file.path).num_row_groups == 1
    peak, count = 0, 0
    for _ in read_documents(file):
        count += 1
        peak = max(peak, pa.total_allocated_bytes())
    assert count == 7000 and peak < 32_000_000  # unbuffered: 74 MB


@pytest.mark.parametrize("package, name", [("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet")])
def test_a_missing_library_is_a_user_error(tmp_path, monkeypatch, package, name):
    write_lines(tmp_path / "a.txt.zst", ["x"])
    write_parquet(tmp_path / "a.parquet", ["x"])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=rf"needs the package {package}; install it: pip install 'megatron-bit\[data\]'"
    ):
        texts(tmp_path / name)


def test_zst_files_of_several_frames_and_broken_ones(tmp_path):
    compress = zstandard.ZstdCompressor().compress
    path = tmp_path / "a.txt.zst"
    path.write_bytes(compress(b"one ") + compress(b"") + compress(b"two" * 200_000))
    assert texts(path) == ["one " + "two" * 200_000]
    for broken in (compress(b"text" * 1000)[:-3], compress(b"a") + compress(b"text")[:5], b"plain text"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"a\.txt\.zst is damaged"):
            texts(path)


def test_large_zst_text_is_split_like_any_other(tmp_path):
    parts = ["one\n", "x" * SPLIT_ABOVE + "\r\n", "three"]
    data = "\n\n\n".join(parts).encode()
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "a.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(data))
    assert texts(tmp_path / "a.txt") == texts(tmp_path / "a.txt.zst") == [parts[0], parts[1], parts[2]]


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    (tmp_path / "a.py").write_bytes(b"good\nbad \xe9\n")
    with pytest.raises(UserError, match=r"a\.py, line 2: byte 0xE9 is not UTF-8"):
        texts(tmp_path / "a.py")
    long = b"= A =\n" + b"y" * SPLIT_ABOVE + b"\n\n\n= B =\n\xff\n\n\n= C =\n"
    (tmp_path / "b.txt").write_bytes(long)
    with pytest.raises(UserError, match=r"b\.txt, line 6: byte 0xFF"):
        texts(tmp_path / "b.txt")
    assert [text[:5] for text in texts(tmp_path / "b.txt", on_error="skip")] == ["= A =", "= C ="]


def test_all_formats_in_one_folder(tmp_path, prepared):
    """The same documents from every format, in the order of the file names; what is left out is in the manifest."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_lines(corpus / "a.jsonl.zst", [json.dumps({"text": f"line {i} of json"}) for i in range(50)] + ["{"])
    write_parquet(corpus / "b.parquet", pa.array([f"row {i} of parquet" for i in range(50)] + [None, ""]))
    write_lines(corpus / "c.txt.zst", ["plain text"])
    options = PrepareOptions(
        (str(corpus),), tmp_path / "out", prepared.tokenizer_path, workers=1, shard_tokens=300, validation_fraction=0
    )
    sampled_first = "b.parquet, row 50: 'text' is null"  # the order of the hash of the names
    for tokenizer, place in ((options.tokenizer, "a.jsonl.zst, line 51: not JSON"), (None, sampled_first)):
        with pytest.raises(UserError, match=rf"^input file .*{re.escape(place)}"):
            prepare(PrepareOptions(**{**options.__dict__, "tokenizer": tokenizer}), progress=False)
    options = PrepareOptions(**{**options.__dict__, "on_error": "skip", "out": tmp_path / "again"})
    manifest = prepare(options, progress=False)
    tokenizer = Tokenizer(manifest.tokenizer_path)
    found = [
        tokenizer.decode(ids)
        for shard in manifest.split("train").shards
        for ids in read_shard_documents(manifest.shard_path(shard))
    ]
    assert found == [
        *(f"line {i} of json" for i in range(50)),
        *(f"row {i} of parquet" for i in range(50)),
        "plain text\n",
    ]
    assert manifest.dropped == {"damaged": 2, "empty": 1}
