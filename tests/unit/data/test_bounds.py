"""What a file claims or hides takes bounded memory: windows, ratios, lines, documents, pages."""

import gzip
import json
import lzma
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from mbit_data import decompress, json_values, read, records
from mbit_data.inputs import expand_inputs
from mbit_data.read import Reading, read_documents

from megatron_bit.errors import UserError

pytestmark = pytest.mark.slow

MIB = 1 << 20


def documents(path, **reading):
    how = Reading(**reading)
    (file,) = expand_inputs([str(path)])
    return [document.text for document in read_documents(file, how)], how


def peak(code, *args):
    """MiB that a new process takes for the code beyond its imports."""
    script = (
        "import resource, sys\nfrom mbit_data.inputs import expand_inputs\nfrom mbit_data.read import *\n"
        "from mbit_data.read import _is_text\nimport pyarrow.parquet, zstandard\n"
        "from megatron_bit.errors import UserError\n"
        "rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\nbefore = rss()\n"
        f"(file,) = expand_inputs([sys.argv[1]])\n{code}\nprint(rss() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def zst(path, size, **how):
    with open(path, "wb") as file, zstandard.ZstdCompressor(**how).stream_writer(file) as writer:
        for _ in range(size // MIB):
            writer.write(b"abc def ghi\n" * (MIB // 12))


def xz(path, size):
    with lzma.open(path, "wb", preset=1) as file:
        for _ in range(size // MIB):
            file.write(b"abc def ghi\n" * (MIB // 12))


@pytest.mark.parametrize("write, name", [(zst, "a.txt.zst"), (xz, "a.txt.xz")])
def test_a_look_at_the_beginning_takes_the_beginning(tmp_path, write, name):
    """256 MiB in some kB: without bounds all of it, or its share in the first 128 KiB."""
    write(tmp_path / name, 256 * MIB)
    assert (tmp_path / name).stat().st_size < MIB
    assert peak("_is_text(file)", tmp_path / name) < 40
    refused = (
        "try: list(read_documents(file))\nexcept UserError as error: assert 'in one document' in str(error), error"
    )
    assert peak(refused, tmp_path / name) < 250  # 16 MiB of characters, and what joining them takes


@given(st.lists(st.binary(max_size=300_000), max_size=4), st.sampled_from([1, 3, 19]), st.booleans(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_zstd_frames_come_back_and_every_cut_is_found(tmp_path_factory, frames, level, checksum, sized):
    path = tmp_path_factory.getbasetemp() / "a.zst"
    how = zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=sized)
    skipped = b"\x51\x2a\x4d\x18\x03\0\0\0abc"
    data = skipped.join(how.compress(frame * 3) for frame in frames)
    path.write_bytes(data)
    (file,) = expand_inputs([str(path)])
    with decompress.open_input(file) as opened:
        assert opened.stream.read() == b"".join(frame * 3 for frame in frames)
    last = len(how.compress(frames[-1] * 3)) if frames else 0
    for cut in {1, 2, 5, last // 2, last - 1}:
        if 0 < cut < last:
            path.write_bytes(data[:-cut])
            with pytest.raises(UserError, match=r"a\.zst is damaged"):
                (file,) = expand_inputs([str(path)])
                with decompress.open_input(file) as opened:
                    opened.stream.read()


@given(st.binary(min_size=1, max_size=5000), st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_a_garbled_zstd_file_is_damaged_or_the_same(tmp_path_factory, content, at, other):
    path = tmp_path_factory.getbasetemp() / "b.zst"
    data = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(content))
    data[at % len(data)] ^= other
    path.write_bytes(data)
    (file,) = expand_inputs([str(path)])
    try:
        with decompress.open_input(file) as opened:
            found = opened.stream.read()
    except UserError:
        return
    assert found == content or data[:4] != b"\x28\xb5\x2f\xfd"  # a bit that means nothing, or a frame to skip


def test_windows_above_the_limit_are_one_line(tmp_path):
    for bits, fits in ((27, True), (28, False), (31, False)):
        parameters = zstandard.ZstdCompressionParameters(window_log=bits, strategy=1, hash_log=6, chain_log=6)
        writer = zstandard.ZstdCompressor(compression_params=parameters)
        with open(tmp_path / f"{bits}.txt.zst", "wb") as file, writer.stream_writer(file) as stream:
            stream.write(b"text")
        if fits:
            assert documents(tmp_path / f"{bits}.txt.zst")[0] == ["text"]
        else:
            with pytest.raises(
                UserError, match=rf"{bits}\.txt\.zst needs {1 << bits - 20} MiB, more memory .* 128 MiB"
            ):
                documents(tmp_path / f"{bits}.txt.zst")
    for size, fits in ((1 << 27, True), (1 << 29, False)):
        path = tmp_path / "a.txt.xz"
        data = lzma.compress(b"text", lzma.FORMAT_XZ, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}])
        path.write_bytes(_with_dictionary(data, size))
        if fits:
            assert documents(path)[0] == ["text"]
        else:
            with pytest.raises(UserError, match=r"a\.txt\.xz needs more memory to be decompressed than the 128 MiB"):
                documents(path)


def _with_dictionary(data, size):
    """An .xz of another dictionary, without the memory of making one: the byte that says it, and its header's CRC."""
    import zlib

    header = bytearray(data[12 : 12 + 4 * (data[12] + 1)])
    bits = size.bit_length() - 1
    header[4] = 2 * (bits - 12)  # dictionary of 2^bits bytes
    header[-4:] = zlib.crc32(header[:-4]).to_bytes(4, "little")
    return data[:12] + bytes(header) + data[12 + len(header) :]


def test_xz_streams_come_one_after_another_and_nothing_behind_is_lost(tmp_path):
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(b"one ") + bytes(8) + lzma.compress(b"") + lzma.compress(b"two") + bytes(4))
    assert documents(path)[0] == ["one two"]
    for behind in (b"garbage", lzma.compress(b"more")[:-1], lzma.compress(b"more")[:9]):
        path.write_bytes(lzma.compress(b"one") + behind)
        with pytest.raises(UserError, match=r"a\.txt\.xz is damaged"):  # the library takes garbage for the end
            documents(path)


def test_a_line_or_document_above_the_limit_is_refused_or_counted(tmp_path, monkeypatch):
    for module, name in ((records, "MAX_LINE"), (json_values, "MAX_VALUE"), (read, "MAX_TEXT")):
        monkeypatch.setattr(module, name, 2 * MIB if name == "MAX_TEXT" else 8 * MIB)
    monkeypatch.setattr(records, "CHUNK", 1000)
    good, long, longer = ({"text": "x" * n} for n in (2 * MIB, 2 * MIB + 1, 9 * MIB))
    rows = [good, long, longer, {"text": "last"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: more than .* MiB in one document; .*--on-error skip"):
        documents(tmp_path / "a.jsonl")
    texts, reading = documents(tmp_path / "a.jsonl", on_error="skip")
    assert texts == [good["text"], "last"] and reading.damaged == 2
    (tmp_path / "a.json").write_text(json.dumps(rows[:2] + rows[3:]))
    assert documents(tmp_path / "a.json", on_error="skip")[0] == [good["text"], "last"]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"a\.json, line 1: more than 8 MiB in one record"):
        documents(tmp_path / "a.json", on_error="skip")
    pq.write_table(pa.table({"text": [row["text"] for row in rows]}), tmp_path / "a.parquet")
    texts, reading = documents(tmp_path / "a.parquet", on_error="skip")
    assert texts == [good["text"], "last"] and reading.damaged == 2
    text = "é" * (3 * MIB // 2)
    (tmp_path / "a.md").write_text(text)
    with pytest.raises(UserError, match=r"a\.md, line 1: more than .* MiB in one document"):
        documents(tmp_path / "a.md")
    parts = ["first\n", text + "\n", "x" * (2 * MIB + 5), "third\n", "y\n" * MIB + "end"]
    (tmp_path / "a.txt").write_text("\n\n\n".join(parts))
    texts, reading = documents(tmp_path / "a.txt", on_error="skip")
    assert texts == ["first\n", "third\n"] and reading.damaged == 3
    with pytest.raises(UserError, match=r"a\.txt, line 5: more than"):
        documents(tmp_path / "a.txt")


def test_a_gigantic_line_takes_no_memory(tmp_path):
    """1 GiB without a line end, in a sparse file of NULs behind a beginning that is text."""
    for name, begin in (
        ("a.jsonl", b'{"text": "'),
        ("a.txt", b"x" * 10_000),
        ("a.json", b'[{"text": "'),
        ("a.c", b"x"),
    ):
        (tmp_path / name).write_bytes(begin)
        os.truncate(tmp_path / name, 1 << 30)
        code = "try: list(read_documents(file))\nexcept UserError as error: assert 'MiB in one' in str(error), error"
        assert peak(f"{code}\nelse: raise SystemExit('read')", tmp_path / name) < 700, name


def test_a_page_of_parquet_that_stands_for_much_more(tmp_path):
    """A dictionary of one text of 10 MB for 256 rows: decoded together they were 2.5 GB."""
    table = pa.table({"text": ["x" * 10_000_000] * 256})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", write_statistics=False)
    assert (tmp_path / "a.parquet").stat().st_size < MIB
    assert peak("for document in read_documents(file): pass", tmp_path / "a.parquet") < 200


def test_gzip_is_read_in_pieces_too(tmp_path):
    with gzip.open(tmp_path / "a.txt.gz", "wb", 9) as file:
        for _ in range(256):
            file.write(b"abc def ghi\n" * (MIB // 12))
    assert peak("_is_text(file)", tmp_path / "a.txt.gz") < 40
