"""Token arrays into webdataset tar shards; a file has its final name only when it is complete on disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import numpy as np

from mbit_data.tokenize import TokenizedDocument
from megatron_bit.data.documents import encode_lengths
from megatron_bit.data.manifest import Shard, Split, lengths_file
from megatron_bit.io.files import PARTIAL, sync_folder, write_atomic


class _HashingFile(io.RawIOBase):
    """A file being written, hashed on the way: no second read for the manifest."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.hash = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.file.tell()

    def write(self, data) -> int:
        self.hash.update(data)
        return self.file.write(data)


class _ShardFile:
    """One shard while it is written: `<key>.json` and `<key>.tokens.npy` for each document."""

    def __init__(self, folder: Path, name: str):
        self.path = folder / name
        self.partial = folder / (name + PARTIAL)
        self.file = open(self.partial, "wb")  # noqa: SIM115 (finish or abandon closes it)
        self.hashing = _HashingFile(self.file)
        self.tar = tarfile.TarFile(fileobj=self.hashing, mode="w", format=tarfile.USTAR_FORMAT)
        self.lengths: list[int] = []  # of the documents
        self.tokens = self.text_bytes = 0

    def add(self, key: str, document: TokenizedDocument) -> None:
        about = {
            "source": document.source,
            "document": document.index,
            "bytes": document.text_bytes,
            "tokens": len(document.tokens),
        }
        payload = io.BytesIO()
        np.lib.format.write_array(payload, document.tokens, version=(1, 0), allow_pickle=False)
        self._member(f"{key}.json", json.dumps(about).encode())
        self._member(f"{key}.tokens.npy", payload.getvalue())
        self.lengths.append(len(document.tokens))
        self.tokens += len(document.tokens)
        self.text_bytes += document.text_bytes

    def _member(self, name: str, data: bytes) -> None:
        header = tarfile.TarInfo(name)  # time, owner and group 0: the bytes depend on the content alone
        header.size = len(data)
        self.tar.addfile(header, io.BytesIO(data))

    def finish(self, check: Callable[[], None]) -> Shard:
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        size = self.file.tell()
        self.file.close()
        check()
        lengths = encode_lengths(self.lengths)  # before the tar, which says that the shard is finished
        write_atomic(self.path.with_name(lengths_file(self.path.name)), lengths)
        os.replace(self.partial, self.path)
        sync_folder(self.path.parent)
        return Shard(
            self.path.name,
            len(self.lengths),
            self.tokens,
            self.text_bytes,
            size,
            self.hashing.hash.hexdigest(),
            hashlib.sha256(lengths).hexdigest(),
        )

    def abandon(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self.file.closed or os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.partial)):
                self.partial.unlink(missing_ok=True)  # and not that of another process, in a folder of the same name
        self.file.close()


class SplitWriter:
    """The shards of one split: `<split>-000000.tar`, each closed at `shard_tokens` tokens or more.

    Documents are never cut, so a shard exceeds `shard_tokens` by less than its last document.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        shard_tokens: int,
        shards: Iterable[Shard] = (),
        check: Callable[[], None] = lambda: None,
    ):
        """`split` begins the names; `shards` are finished ones of an earlier run, to go on behind them; `check` raises
        if the folder is another process's by now."""
        self._check = check
        self._folder = folder
        self._split = split
        self._shard_tokens = shard_tokens
        self._shards = list(shards)
        self._open: _ShardFile | None = None

    def add(self, key: str, document: TokenizedDocument) -> Shard | None:
        """Append a document under a key that no other document has; the shard, if that completed it. Raises OSError."""
        if self._open is None:
            self._check()
            self._open = _ShardFile(self._folder, f"{self._split}-{len(self._shards):06d}.tar")
        self._open.add(key, document)
        return self._finish_shard(self._open) if self._open.tokens >= self._shard_tokens else None

    def finish(self) -> Split:
        """Close the last shard. Raises OSError."""
        if self._open is not None:
            self._finish_shard(self._open)
        return Split(tuple(self._shards))

    def abandon(self) -> None:
        """Remove the shard begun, after an error."""
        if self._open is not None:
            self._open.abandon()
            self._open = None

    def _finish_shard(self, shard: _ShardFile) -> Shard:
        finished = shard.finish(self._check)
        self._shards.append(finished)
        self._open = None
        return finished
