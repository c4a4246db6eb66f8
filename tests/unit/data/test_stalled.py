"""A prepare or convert that stood still for long, and comes back when its folder is another process's."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mbit_data import work as module
from mbit_data.array import prepare_part
from mbit_data.options import Part
from mbit_data.prepare import PrepareOptions, prepare
from mbit_data.write import _ShardFile

from megatron_bit.errors import UserError


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def _options(text: Path, out: Path, **more: Any) -> PrepareOptions:
    return PrepareOptions(inputs=(str(text),), out=out, vocab_size=280, shard_tokens=3000, workers=1, **more)


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    made = []
    for name, word in (("one", "alpha beta"), ("two", "gamma delta")):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(30):
            (folder / f"{number:02d}.txt").write_text(" ".join(f"{word} {number * i % 97}" for i in range(120)))
        made.append(folder)
    return made


def _once(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, number: int, meanwhile: Callable[[], None]) -> None:
    """Something happens just before the n-th call."""
    plain, count = getattr(where, name), [0]

    def slow(*args: Any, **more: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            meanwhile()
        return plain(*args, **more)

    monkeypatch.setattr(where, name, slow)


MOMENTS = [(_ShardFile, "__init__", 1), (_ShardFile, "__init__", 3), (_ShardFile, "finish", 2), (_ShardFile, "add", 5)]


@pytest.mark.parametrize("part", [None, Part(0, 1)])
@pytest.mark.parametrize("how", ["moved", "removed"])
@pytest.mark.parametrize(("where", "name", "number"), [*MOMENTS, (module, "train_tokenizer", 1)])
def test_the_folder_is_another_by_then(
    where: Any, name: str, number: int, how: str, part: Part | None, texts: list[Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out, there = tmp_path / "out", {}

    def meanwhile() -> None:
        monkeypatch.undo()
        if how == "moved":
            out.rename(tmp_path / "away")
        else:
            shutil.rmtree(out)
        prepare(_options(texts[1], out), progress=False)
        there.update(_hashes(out))

    _once(monkeypatch, where, name, number, meanwhile)
    begin = prepare if part is None else prepare_part
    with pytest.raises(UserError, match=r"(is not the folder any more|No such file)"):
        begin(_options(texts[0], out, part=part), progress=False)
    assert there and _hashes(out) == there
    prepare(_options(texts[1], out), progress=False)  # finished, and whole


def test_another_goes_on_with_the_folder(texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no lock holds: the one that has stood still leaves it to the other."""
    from mbit_data import lock

    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: None)
    out, there, plain = tmp_path / "out", {}, _ShardFile.finish

    def slow(self: Any, *args: Any) -> Any:
        if not there:
            monkeypatch.setattr(_ShardFile, "finish", plain)
            prepare(_options(texts[0], out), progress=False)
            there.update(_hashes(out))
        return plain(self, *args)

    monkeypatch.setattr(_ShardFile, "finish", slow)
    with pytest.raises(UserError, match=r"(is not the folder any more|No such file)"):
        prepare(_options(texts[0], out), progress=False)
    assert _hashes(out) == there
