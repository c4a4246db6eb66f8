"""Task files in their authors' formats, and planted tasks whose answers are known."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path

import pytest
from known import Known

from megatron_bit.errors import UserError
from megatron_bit.evaluation import task_files
from megatron_bit.evaluation.task_files import Item, read, thin
from megatron_bit.evaluation.tasks import last_word, rank

SETTINGS = {"seed": 0, "batch_size": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All four tasks, two items each."""
    for name in ("lambada", "hellaswag", "piqa"):
        (tmp_path / name).mkdir()
    passages = [{"text": 'He said:\n"give me the lamp'}, {"text": "one two\u2028three"}]
    (tmp_path / "lambada" / "lambada_test.jsonl").write_text("".join(f"{json.dumps(p)}\n" for p in passages))
    items = ["Roof: A man. he", "3", "a.", "b.", "c.", "d.", "Snow: She", "0", "e.", "f.", "g.", "h."]
    (tmp_path / "hellaswag" / "hellaswag_val_full.txt").write_text("\n".join(items) + "\n")
    pairs = [{"goal": "To cut", "sol1": "knife ", "sol2": "spoon"}, {"goal": "dry", "sol1": "rain", "sol2": "sun"}]
    (tmp_path / "piqa" / "valid.jsonl").write_text("".join(f"{json.dumps(p)}\n" for p in pairs))
    (tmp_path / "piqa" / "valid-labels.lst").write_text("0\n1\n")
    with tarfile.open(tmp_path / "blimp.tar.xz", "w:xz") as tar:
        for name in ("b", "a"):
            line = {"sentence_good": f"{name} is.", "sentence_bad": f"{name} are.", "UID": name}
            data = json.dumps(line).encode()
            info = tarfile.TarInfo(f"blimp/{name}.jsonl")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return tmp_path


def test_the_formats(folder: Path) -> None:
    assert read("lambada", folder) == [
        Item('He said:\n"give me the', (" lamp",), 0),
        Item("one", (" two\u2028three",), 0),
    ]
    assert read("hellaswag", folder) == [
        Item("Roof: A man. he", (" a.", " b.", " c.", " d."), 3),
        Item("Snow: She", (" e.", " f.", " g.", " h."), 0),
    ]
    assert read("piqa", folder) == [
        Item("Question: To cut\nAnswer:", (" knife", " spoon"), 0),
        Item("Question: dry\nAnswer:", (" rain", " sun"), 1),
    ]
    blimp = [Item("", (f"{name} is.", f"{name} are."), 0) for name in "ab"]
    assert read("blimp", folder) == blimp
    with tarfile.open(folder / "blimp.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    (folder / "blimp.tar.xz").unlink()
    assert read("blimp", folder) == blimp


@pytest.mark.parametrize(
    ("task", "file", "text", "said"),
    [
        ("lambada", "lambada/lambada_test.jsonl", None, "does not exist"),
        ("lambada", "lambada/lambada_test.jsonl", "", "has no items"),
        ("lambada", "lambada/lambada_test.jsonl", "{", "cannot be read: JSONDecodeError"),
        ("hellaswag", "hellaswag/hellaswag_val_full.txt", "a\n1\nb\n", "3 lines are no multiple of 6"),
        ("hellaswag", "hellaswag/hellaswag_val_full.txt", "a\n4\nb\nc\nd\ne\n", "no choice 4"),
        ("piqa", "piqa/valid-labels.lst", "0\n", "ValueError"),
        ("piqa", "piqa/valid.jsonl", '{"goal": ""}\n{}', "KeyError"),
        ("lambada", "lambada/lambada_test.jsonl", '{"text": ["a b"]}', r"line 1 has text .* which is no text"),
        ("lambada", "lambada/lambada_test.jsonl", '\n["text"]', "line 2 is no JSON object"),
        ("piqa", "piqa/valid.jsonl", '{"goal": 7, "sol1": "a", "sol2": "b"}', "line 1 has goal '7'"),
        ("piqa", "piqa/valid.jsonl", '{"goal": "g", "sol1": "a", "sol2": 0.5}', "line 1 has sol2 '0.5'"),
        ("blimp", "blimp.tar.xz", "no tar", "ReadError"),
    ],
)
def test_bad_files(task: str, file: str, text: str | None, said: str, folder: Path) -> None:
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(UserError, match=said):
        read(task, folder)


def test_an_archive_that_unpacks_without_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_files, "MOST", 10)
    with pytest.raises(UserError, match=r"blimp.tar.xz cannot be read: ValueError more than 0 MiB in it"):
        read("blimp", folder)


def test_thin_is_spread_evenly() -> None:
    items = [Item("", (str(i),), 0) for i in range(10)]
    assert [i.choices[0] for i in thin(items, 4)] == ["0", "2", "5", "7"]
    assert thin(items, None) == thin(items, 11) == items


def test_a_planted_task() -> None:
    """The right answer is cheapest by its nats, by its nats per byte, by both, or by neither."""
    model = Known({"c": 9.0, "a": 1.0, "b": 0.4})
    items = [
        Item("cc", ("a", "bbbb"), 0),  # 1 and 1.6 nats: right; a byte 1 and 0.4: wrong
        Item("cccc", ("a", "bbbb"), 1),  # the other way round
        Item("", ("aa", "bb"), 1),
        Item("c" * 100, ("aa", "bb"), 0),  # longer than the context, which costs nothing
    ]
    found = rank("planted", model, items, **SETTINGS)
    assert (found.items, found.accuracy, found.accuracy_per_byte, found.chance) == (4, 0.5, 0.5, 0.5)
    assert found.standard_error == pytest.approx(math.sqrt(0.25 / 3))
    best = rank("planted", model, [items[0], items[2]], **SETTINGS)
    assert (best.accuracy, best.standard_error, best.accuracy_per_byte) == (1.0, 0.0, 0.5)
    four = rank("planted", model, [Item("", ("a", "b", "c", "cc"), 1)], **SETTINGS)
    assert (four.chance, four.accuracy) == (0.25, 1.0)


def test_the_choices_of_an_item_share_their_noise() -> None:
    model = Known({"b": 0.9}, noise=5.0)
    items = [Item("a" * i, ("x", "b"), 1) for i in range(20)]
    assert rank("planted", model, items, **SETTINGS).accuracy == 1.0


def test_last_words() -> None:
    model = Known({"c": 9.0})
    found = last_word("lambada", model, [Item("ccc", ("abc",), 0), Item("c", ("ab",), 0)], **SETTINGS)
    assert found.nats_per_word == pytest.approx((11 + 2) / 2)
    assert found.standard_error == pytest.approx(4.5) and found.perplexity == pytest.approx(math.exp(6.5))
    assert (found.accuracy, found.accuracy_not_computed) == (0.5, None)  # of known.py: words of even length
    model.head = "diffusion"
    blind = last_word("lambada", model, [Item("c", ("ab",), 0)], **SETTINGS)
    assert blind.accuracy is None and blind.accuracy_not_computed and blind.nats_per_word == 2.0
