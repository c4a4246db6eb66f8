"""What of a folder is finished while it is being made, so that a killed `prepare` goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from mbit_data.options import differences
from megatron_bit.data.manifest import LENGTHS_SUFFIX, SPLITS, Shard, lengths_file
from megatron_bit.data.manifest_schema import LIMIT, ShardEntry
from megatron_bit.errors import UserError
from megatron_bit.io.files import PARTIAL, write_atomic
from megatron_bit.io.strict_json import Count, Sha256, fits, tree

CHANGED = "none: the input has changed"  # in place of the code
BEFORE_SHARDS = 2  # lines: header and tokenizer


class ShardLine(TypedDict):
    """A finished shard."""

    split: Literal["train", "validation"]
    last_document: Count
    shard: ShardEntry


class TokenizerLine(TypedDict):
    tokenizer_sha256: Sha256


SHARD_LINE: TypeAdapter[ShardLine] = TypeAdapter(ShardLine)
TOKENIZER_LINE: TypeAdapter[TokenizerLine] = TypeAdapter(TokenizerLine)


@dataclass
class Finished:
    """The complete shards of one split, each with the number of the last document in it."""

    entries: list[tuple[Shard, int]] = field(default_factory=list)

    @property
    def shards(self) -> list[Shard]:
        return [shard for shard, _ in self.entries]

    @property
    def last_document(self) -> int:
        return self.entries[-1][1] if self.entries else -1


class Journal:
    """A file of JSON lines: what is made here, by which code, then every finished shard, in the order of finishing."""

    def __init__(self, path: Path, identity: Mapping[str, Any], code: str, prefix: str = ""):
        """Begin the journal, or go on with the one that is there. `prefix`: of the shards it is for, behind the split.

        Shards that are not in it, or not as it says, are removed. Made by other code, none of them is kept.
        Raises UserError if the folder is for other options or inputs, OSError.
        """
        self.path = path
        self.notes: list[str] = []
        self.finished: dict[str, Finished] = {split: Finished() for split in SPLITS}
        self.tokenizer_sha256: str | None = None
        self.continued = False  # keys and tokenizer in the folder are ours
        self._header = header = {"identity": dict(identity), "code_sha256": code}
        if path.exists():
            self._continue(header)
        self._remove_others(prefix)
        lines = [json.dumps(header)]
        lines += [json.dumps({"tokenizer_sha256": self.tokenizer_sha256})] if self.tokenizer_sha256 else []
        lines += [_line(split, *entry) for split, done in self.finished.items() for entry in done.entries]
        write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
        self._ours = os.stat(path)

    def check(self) -> None:
        """UserError if the folder is not this process's any more, which may have stood still for long: nothing more may
        be written there. Whoever goes on with a folder, or begins one of that name, writes a journal of its own."""
        try:
            if os.path.samestat(self._ours, os.stat(self.path)):
                return
        except FileNotFoundError:
            pass
        raise UserError(
            f"{self.path.parent} is not the folder any more that this prepare was at work on: it was removed or "
            "replaced, or another prepare goes on with it; nothing more is written there"
        )

    def add(self, split: str, shard: Shard, last_document: int) -> None:
        """A shard is complete on disk; `last_document` is the number of the last document in it. Raises OSError."""
        self.finished[split].entries.append((shard, last_document))
        self._append(_line(split, shard, last_document))

    def use_tokenizer(self, sha256: str) -> None:
        """All shards are of this tokenizer. Raises UserError if those that are kept are of another one, OSError."""
        if self.tokenizer_sha256 is None:
            self.tokenizer_sha256 = sha256
            self._append(json.dumps({"tokenizer_sha256": sha256}))
        elif self.tokenizer_sha256 != sha256:
            raise UserError(
                f"the tokenizer in {self.path.parent} was changed, and finished shards there are of the old one; "
                "remove the folder and prepare it again"
            )

    def forget(self) -> None:
        """Keep nothing for another start: what is finished may be of other bytes than were hashed. Raises OSError."""
        self.finished = {split: Finished() for split in SPLITS}
        self.check()
        write_atomic(self.path, (json.dumps({**self._header, "code_sha256": CHANGED}) + "\n").encode())

    def _append(self, line: str) -> None:
        self.check()
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _continue(self, header: dict[str, Any]) -> None:
        try:
            if self.path.stat().st_size > LIMIT:
                raise ValueError("no journal has so many bytes")
            lines = self.path.read_text(encoding="utf-8").rstrip("\n").split("\n")
            there = tree(lines[0].encode())
            different = differences(there["identity"], header["identity"])
            code = there.get("code_sha256")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path} is damaged; remove the folder {self.path.parent} and prepare it again"
            ) from error
        if different and len(lines) <= BEFORE_SHARDS:
            self.notes.append(
                f"an unfinished prepare of other data, without a finished shard, is replaced ({different})"
            )
            return
        if different:
            raise UserError(
                f"{self.path.parent} holds an unfinished prepare of other data: {different}; run that one again, "
                "choose another folder, or remove it"
            )
        if code != header["code_sha256"]:
            why = "whose input changed" if code == CHANGED else "by other code"
            self.notes.append(f"an unfinished prepare {why} is here: begun again")
            return
        self.continued = True
        broken: set[str] = set()
        for line in lines[1:]:
            try:
                entry = tree(line.encode())
                if "tokenizer_sha256" in entry:
                    self.tokenizer_sha256 = fits(entry, TOKENIZER_LINE, "line", "")["tokenizer_sha256"]
                    continue
                checked = fits(entry, SHARD_LINE, "line", "")
                split, shard, last = checked["split"], Shard(**checked["shard"]), checked["last_document"]
            except (ValueError, TypeError, UserError):
                break  # the line that was being written
            if split not in broken and _is_whole(self.path.parent, shard):
                self.finished[split].entries.append((shard, last))
            else:
                broken.add(split)  # the shards behind it begin where it ended
        kept = sum(len(done.shards) for done in self.finished.values())
        if kept:
            self.notes.append(f"{kept} finished shards are kept")

    def _remove_others(self, prefix: str) -> None:
        shards = {shard.file for done in self.finished.values() for shard in done.shards}
        names = shards | {lengths_file(shard) for shard in shards}
        endings = f"(\\.tar|{re.escape(LENGTHS_SUFFIX)})({re.escape(PARTIAL)})?"
        ours = re.compile(rf"({'|'.join(SPLITS)})-{prefix}\d{{6}}{endings}")
        for path in self.path.parent.iterdir():
            if ours.fullmatch(path.name) and path.name not in names:
                path.unlink()


def _line(split: str, shard: Shard, last_document: int) -> str:
    return json.dumps({"split": split, "last_document": last_document, "shard": asdict(shard)})


def _is_whole(folder: Path, shard: Shard) -> bool:
    def digest(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    try:
        return digest(shard.file) == shard.sha256 and digest(lengths_file(shard.file)) == shard.lengths_sha256
    except OSError:
        return False
