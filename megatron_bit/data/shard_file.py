"""A shard as a file: the members of a plain tar, read once from its beginning to its end and hashed on the way."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from typing import IO

READ_BYTES = 256 * 1024
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class ShardFile:
    """A tar file of a known size. What it claims beyond that is refused before memory is taken for it."""

    def __init__(self, stream: IO[bytes], size: int, hashed: bool) -> None:
        """`hashed`: `sha256` is wanted at the end."""
        self._stream, self._left = stream, size
        self._size = size
        self._hash = hashlib.sha256() if hashed else None
        self.position = 0  # the byte behind the last member

    def read(self, count: int) -> bytes:
        """As a file's `read`, which tarfile calls."""
        data = self._stream.read(min(count, self._left))
        self._left -= len(data)
        if self._hash is not None:
            self._hash.update(data)
        return data

    def members(self) -> Iterator[tuple[str, bytes]]:
        """(name, content) of the regular files. Raises ValueError, tarfile.TarError, OSError.

        tarfile alone, in the mode that reads forwards: webdataset's reader, which uses it, takes a compressed tar for
        a tar and a sparse member for as many zeros as its header says.
        """
        start = self._stream.read(6)
        self._stream.seek(0)
        for magic, kind in _COMPRESSED.items():
            if start.startswith(magic):
                raise ValueError(f"it is compressed ({kind}), and a shard is a plain tar")
        with tarfile.open(fileobj=self, mode="r|", bufsize=READ_BYTES) as tar:  # type: ignore[arg-type]
            while (member := tar.next()) is not None:
                tar.members = []  # it would keep all of them
                if member.issparse() or member.size > self._size - member.offset_data:
                    kind = "sparse" if member.issparse() else f"of {member.size} bytes"
                    raise ValueError(f"member {member.name!r} is {kind}, in a file of {self._size}")
                if member.isreg():
                    file = tar.extractfile(member)
                    assert file is not None, member.name
                    data = file.read()
                    self.position = member.offset_data + member.size
                    yield member.name, data

    def sha256(self) -> str:
        """Of the whole file (hex), when its members have been read."""
        assert self._hash is not None
        while self.read(READ_BYTES):
            pass
        return self._hash.hexdigest()
