"""`prepare --raw-bits`: records into shards and out again, to the bit."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from mbit_data.inspection import inspect, render
from mbit_data.raw import RawOptions, prepare_raw
from mbit_data.verify import verify
from mbit_data.write import SplitWriter

from megatron_bit.data.manifest import Manifest, load_manifest
from megatron_bit.data.stream import read_documents
from megatron_bit.errors import UserError


def records(bits: int, count: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, ceil(bits / 8)], the unused bits of the last byte 0."""
    values = np.random.default_rng(seed).integers(0, 256, (count, -(-bits // 8)), dtype=np.uint8)
    values[:, -1] &= 256 - 2 ** (-bits % 8)
    return values


def options(folder: Path, bits: int, **more: object) -> RawOptions:
    settings = {"document_records": 10, "validation_fraction": 0.3, "shard_tokens": 25, **more}
    return RawOptions((str(folder / "in"),), folder / "out", bits, **settings)  # type: ignore[arg-type]


def stored(manifest: Manifest) -> dict[str, list[bytes]]:
    """The documents of each split."""
    return {
        name: [doc.tobytes() for shard in split.shards for doc in read_documents(manifest.shard_path(shard))]
        for name, split in manifest.splits.items()
    }


@pytest.fixture(params=[1, 8, 12, 256])
def given(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, int, list[bytes]]:
    """Folder, bits, and the documents that have to be found."""
    bits, source = request.param, tmp_path / "in"
    source.mkdir()
    first, second = records(bits, 73), records(bits, 40, 1)
    (source / "a.bin").write_bytes(first.tobytes())
    (source / "b.bin.gz").write_bytes(gzip.compress(second.tobytes(), mtime=0))
    (source / "empty.bin").write_bytes(b"")
    return tmp_path, bits, [part[i : i + 10].tobytes() for part in (first, second) for i in range(0, len(part), 10)]


def test_every_record_is_there_once(given: tuple[Path, int, list[bytes]]) -> None:
    folder, bits, documents = given
    manifest = prepare_raw(options(folder, bits), progress=False)
    found = stored(manifest)
    assert sorted(found["train"] + found["validation"]) == sorted(documents)
    assert all(len(d) for d in found.values()), "both splits have some"
    order = [documents.index(d) for d in found["train"]]
    assert order == sorted(order)
    assert manifest.raw_bits == bits and manifest.record_shape == (-(-bits // 8),)
    assert manifest.dropped == {"empty": 1} and len(manifest.split("train").shards) > 1
    assert sum(split.tokens for split in manifest.splits.values()) == 113
    assert verify(folder / "out") == []
    assert load_manifest(folder / "out") == manifest


def test_the_same_again_and_after_an_interruption(
    given: tuple[Path, int, list[bytes]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, bits, _ = given
    prepare_raw(options(folder, bits), progress=False)
    files = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    prepare_raw(options(folder, bits))
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"holds other data: document_records \(10 there, 11 here\)"):
        prepare_raw(options(folder, bits, document_records=11), progress=False)

    for path in (folder / "out").iterdir():
        path.unlink()
    add, calls = SplitWriter.add, []

    def interrupted(*args: object) -> object:
        calls.append(args)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return add(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_raw(options(folder, bits), progress=False)
    assert not (folder / "out" / "manifest.json").exists()
    prepare_raw(options(folder, bits))
    assert "finished shards are kept" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == files


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x12\x30" * 13 + b"\x12", r"a.bin, record 13: the file ends after 1 of its 2 bytes \(records of 12 bits\)"),
        (b"\x12\x30" * 12 + b"\x12\x31", r"a.bin, record 12: the last 4 bits of its 2 bytes have to be 0"),
    ],
)
def test_damaged_records(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.bin").write_bytes(data)
    (tmp_path / "in" / "b.bin").write_bytes(records(12, 30).tobytes())
    with pytest.raises(UserError, match=said + r".*--on-error skip"):
        prepare_raw(options(tmp_path, 12), progress=False)
    manifest = prepare_raw(options(tmp_path, 12, on_error="skip"), progress=False)
    assert manifest.dropped == {"damaged": 1}
    found = stored(manifest)
    assert sorted(found["train"] + found["validation"]) == sorted(
        [data[:20], *(records(12, 30)[i : i + 10].tobytes() for i in (0, 10, 20))]
    )


def test_inspect(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.bin").write_bytes(b"\xa5\xc0" * 40 + b"\xa5\x40" * 40)  # ten bits, of which one changes
    folder = prepare_raw(options(tmp_path, 10, validation_fraction=0.0), progress=False).folder
    report = inspect(folder, samples=1, tokens=2)
    assert report["constant_bits"] == 9 and report["independent_bits_entropy"] == 1.0
    assert report["share_of_ones"] == [1, 0, 1, 0, 0, 1, 0, 1, 0.5, 1]
    assert report["samples"][0]["first_tokens"][0]["bits"] in ("1010010111", "1010010101")
    assert "9 of the 10 bits never change" in render(report)
    with pytest.raises(UserError, match="leave out --bits and --code"):
        inspect(folder, bits=10)


def test_what_is_not_allowed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.bin").write_bytes(b"")
    for bits in (0, 257):
        with pytest.raises(UserError, match=f"raw_bits is {bits}; allowed are 1 to 256"):
            prepare_raw(options(tmp_path, bits), progress=False)
    with pytest.raises(UserError, match="document_records is 0"):
        prepare_raw(options(tmp_path, 8, document_records=0), progress=False)
    with pytest.raises(UserError, match="the input is empty: no record in 1 files"):
        prepare_raw(options(tmp_path, 8), progress=False)
