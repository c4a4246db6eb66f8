"""What a file is by its name and by what is in it: JSON in its forms, byte order marks, lines."""

import gzip
import io
import json
import lzma

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from mbit_data import json_values
from mbit_data.filters import duplicate_lines
from mbit_data.inputs import expand_inputs
from mbit_data.json_values import BrokenFile, JsonValues
from mbit_data.prepare import PrepareOptions, prepare
from mbit_data.read import Reading, read_documents

from megatron_bit.errors import UserError

ROWS = [{"text": "one \u2028 \f \x85 line", "n": 1}, {"text": "zwei \U0001f600"}, {"text": ""}]
TEXTS = [row["text"] for row in ROWS]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def read(path, **reading):
    how = Reading(**reading)
    (file,) = expand_inputs([str(path)])
    return list(read_documents(file, how)), how


def texts(path, **reading):
    return [document.text for document in read(path, **reading)[0]]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.json", "a.JSONL", "a.ndjson", "c4-train.00000-of-01024.json"])
def test_lines_of_objects(tmp_path, name, bom, compression):
    path = tmp_path / f"{name}{compression}"
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n"
    path.write_bytes(COMPRESS[compression](bom + b"\n" * (not bom) + lines.encode()))
    assert texts(path) == TEXTS
    with pytest.raises(UserError, match=r"no key 'body' \(there: text, n; --text-key names another\)"):
        texts(path, text_key="body")


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(
    "form",
    [
        lambda rows: json.dumps(rows),
        lambda rows: json.dumps(rows, indent=2),
        lambda rows: "\ufeff\n [\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n",
        lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows),
    ],
)
def test_an_array_and_objects_over_several_lines(tmp_path, form, compression):
    path = tmp_path / f"a.json{compression}"
    path.write_bytes(COMPRESS[compression](form(ROWS).encode()))
    documents, _ = read(path)
    assert [document.text for document in documents] == TEXTS
    assert [document.index for document in documents] == [0, 1, 2]
    path.write_bytes(COMPRESS[compression](form([ROWS[0], {"txt": 5}, ROWS[1]]).encode()))
    with pytest.raises(UserError, match=r"no key 'text' \(there: txt; .*--on-error skip"):
        texts(path)
    assert texts(path, on_error="skip") == TEXTS[:2]


@pytest.mark.parametrize(
    "content, message",
    [
        ("plain text", "line 1: neither a JSON object nor an array of them"),
        ("\n\n5", "line 3: neither"),
        ('[{"text": "a"}', "line 1: it ends without ']'"),
        ('[{"text": "a"} {"text": "b"}]', "line 1: '{' where ']' should be"),
        ('[{"text": "a"},\n\n nonsense]', "line 3: not JSON"),
        ('[{"text": "a"},]', "line 1: not JSON"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "line 2: there is more behind the array"),
        ('{\n"text": "a",\n', "line 1: not JSON"),
        ('{"name": "package",\n "version": "1"}', r"record 0 \(line 1\): no key 'text' \(there: name, version"),
        ("[" * 100_000, "line 1: not JSON"),
        ('["a", 5]', r"record 0 \(line 1\): a JSON string, not an object"),
    ],
)
def test_json_that_holds_no_records_is_not_taken_for_text(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=rf"a\.json, {message}") as caught:
        texts(tmp_path / "a.json")
    assert "\n" not in str(caught.value)
    (tmp_path / "a.json").write_text("")
    assert texts(tmp_path / "a.json") == []


@given(
    st.lists(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=9), st.lists, max_leaves=4)),
    st.integers(1, 7),
    st.sampled_from([None, 1]),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_values_come_back_whatever_the_pieces(values, size, indent, array):
    if array:
        data = json.dumps(values, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    else:
        data = b" \n".join(json.dumps(value, indent=indent).encode() for value in values)
    before, json_values.LEAST = json_values.LEAST, 1
    try:
        stream = io.BytesIO(data)
        source = JsonValues(iter(lambda: stream.read(size), b""), 1)
        found = list(source.elements() if array else source.objects())
    except BrokenFile as error:
        assert "UTF-8" in error.args[1] and b"\xed" in data  # half a surrogate pair
        return
    finally:
        json_values.LEAST = before
    assert [value for value, _ in found] == values
    if array and indent is None:
        assert all(line == 1 for _, line in found)


def test_a_byte_order_mark_is_no_text_and_lines_end_at_line_ends(tmp_path):
    mark = "\ufeff".encode()
    for name in ("a.txt", "a.py"):
        (tmp_path / name).write_bytes(mark + "x\ufeff\n".encode())
        assert texts(tmp_path / name) == ["x\ufeff\n"]
    long = "x\f\u2028\x85 y\n" * 200_000
    (tmp_path / "b.txt").write_bytes(mark + f"{long}\n\n{long}".encode())
    assert texts(tmp_path / "b.txt") == [long, long]
    assert duplicate_lines("a\f\u2028a\x85a\x1ca") == 0 and duplicate_lines("a\r\na\ra\nb") == 0.5


def test_a_text_key_that_nothing_uses_is_refused(tmp_path, prepared):
    (tmp_path / "a.txt").write_text("text")
    given, out = prepared.tokenizer_path, tmp_path / "out"
    for key in ("body", "text"):
        with pytest.raises(UserError, match=rf"text_key is '{key}', and no input has records: it is for \.jsonl"):
            prepare(PrepareOptions((str(tmp_path / "a.txt"),), out, given, text_key=key), progress=False)
    (tmp_path / "a.json").write_text('{"body": "x"}')
    manifest = prepare(PrepareOptions((str(tmp_path / "a.json"),), out, given, text_key="body"), progress=False)
    assert sum(split.documents for split in manifest.splits.values()) == 1
