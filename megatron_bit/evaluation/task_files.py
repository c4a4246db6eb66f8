"""The zero-shot tasks as their authors' files have them."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bit.errors import UserError
from megatron_bit.io.files import lines_of
from megatron_bit.io.strict_json import tree

MOST = 256 << 20  # bytes of an archive, unpacked


@dataclass(frozen=True)
class Item:
    """A context (it may be empty) and texts that may follow it."""

    context: str
    choices: tuple[str, ...]
    label: int  # which one is right


def read(task: str, folder: Path) -> list[Item]:
    """All items of a task, a key of TASKS, from its folder of `--tasks-data`.

    Raises:
        UserError: a file is missing or is not what it should be.
    """
    path, reader = folder / TASKS[task][0], TASKS[task][1]
    try:
        items = list(reader(path))
    except FileNotFoundError as error:
        raise UserError(f"task {task}: {error.filename} does not exist; --tasks-data is {folder}") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, tarfile.TarError) as error:
        raise UserError(f"task {task}: {path} cannot be read: {type(error).__name__} {error}") from None
    if not items:
        raise UserError(f"task {task}: {path} has no items")
    for i, item in enumerate(items):
        if not 0 <= item.label < len(item.choices) or not all(item.choices):
            raise UserError(f"task {task}: item {i} of {path} has an empty choice, or no choice {item.label}")
    return items


def thin(items: list[Item], limit: int | None) -> list[Item]:
    """At most `limit` items, evenly spaced, so that all of BLiMP's paradigms are among them."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def _lambada(path: Path) -> Iterator[Item]:
    """OpenAI's files: a passage, whose last word is to be told."""
    for (text,) in _json_lines(path.read_bytes(), "text"):
        context, _, word = text.strip().rpartition(" ")
        yield Item(context, (f" {word}",), 0)


def _hellaswag(path: Path) -> Iterator[Item]:
    """Six lines an item: activity and context, the right ending's number, four endings."""
    lines = lines_of(path.read_bytes().rstrip(b"\r\n"))
    if len(lines) % 6:
        raise ValueError(f"{len(lines)} lines are no multiple of 6")
    for i in range(0, len(lines), 6):
        context, label, *endings = lines[i : i + 6]
        yield Item(context.rstrip(), tuple(f" {ending.strip()}" for ending in endings), int(label))


def _piqa(path: Path) -> Iterator[Item]:
    """Two solutions of a goal, and a file of labels beside it; asked as GPT-3 was (arXiv 2005.14165)."""
    labels = (path.parent / "valid-labels.lst").read_text(encoding="utf-8-sig").split()
    lines = list(_json_lines(path.read_bytes(), "goal", "sol1", "sol2"))
    for (goal, *solutions), label in zip(lines, labels, strict=True):
        yield Item(f"Question: {goal.strip()}\nAnswer:", tuple(f" {text.strip()}" for text in solutions), int(label))


def _blimp(path: Path) -> Iterator[Item]:
    """Minimal pairs, a file a paradigm: in blimp.tar.xz, or in a folder blimp."""
    folder = path.parent / "blimp"
    if folder.is_dir():
        files = [(file.name, file.read_bytes()) for file in folder.rglob("*.jsonl")]
    else:
        with tarfile.open(path) as tar:
            members = [m for m in tar.getmembers() if m.isfile() and m.name.endswith(".jsonl")]
            if sum(m.size for m in members) > MOST:  # unpacked; the 67 paradigms are 20 MiB
                raise ValueError(f"more than {MOST >> 20} MiB in it")
            files = [(m.name, tar.extractfile(m).read()) for m in members]  # type: ignore[union-attr]
    for _, data in sorted(files):
        for good, bad in _json_lines(data, "sentence_good", "sentence_bad"):
            yield Item("", (good, bad), 0)


def _json_lines(content: bytes, *keys: str) -> Iterator[list[str]]:
    """Of each line that is not empty the texts under these keys. ValueError or KeyError if they are none."""
    for number, line in enumerate(lines_of(content), 1):
        if line.strip():
            values: Any = tree(line)
            if not isinstance(values, dict):
                raise ValueError(f"line {number} is no JSON object")
            for key in keys:
                if not isinstance(values[key], str):
                    raise ValueError(f"line {number} has {key} {str(values[key])[:60]!r}, which is no text")
            yield [values[key] for key in keys]


TASKS: dict[str, tuple[str, Callable[[Path], Iterator[Item]]]] = {
    "lambada": ("lambada/lambada_test.jsonl", _lambada),
    "hellaswag": ("hellaswag/hellaswag_val_full.txt", _hellaswag),
    "piqa": ("piqa/valid.jsonl", _piqa),
    "blimp": ("blimp.tar.xz", _blimp),
}
