"""Shards into token arrays, with one window of shards in memory."""

from __future__ import annotations

import hashlib
import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from megatron_bit.config import Verify
from megatron_bit.data.documents import aligned, decode_lengths
from megatron_bit.data.manifest import Manifest, Shard, lengths_file
from megatron_bit.data.npy import decode_array
from megatron_bit.data.shard_file import ShardFile
from megatron_bit.errors import ShardError, UserError
from megatron_bit.io.exhausted import resource_of

TOKENS_SUFFIX = "tokens.npy"


def read_documents(path: Path) -> Iterator[np.ndarray]:
    """The token arrays of a shard's documents, [n] or records [n, bytes], in the order they were written."""
    with open(path, "rb") as stream:
        yield from _documents(ShardFile(stream, path.stat().st_size, hashed=False))


def _documents(file: ShardFile) -> Iterator[np.ndarray]:
    for name, data in file.members():
        if name.endswith(TOKENS_SUFFIX):
            yield decode_array(data)


def read_shard(
    manifest: Manifest, shard: Shard, block_size: int = 1, total: int | None = None, verify: bool = True
) -> np.ndarray:
    """All tokens of a shard, document after document: [total] of the manifest's dtype, of records [total, bytes].

    A copy in the cache that is damaged is thrown away and fetched again, once.

    Args:
        block_size: fill every document up to whole blocks with end-of-document tokens.
        total: tokens with those, as `streamed_tokens` says; may be left out with blocks of 1.
        verify: hash the file while it is read. Without, only what cannot be read or cannot be right is damage.

    Raises ShardError naming the shard, and how far it could be read, if it cannot be had or read to its end, has
    another SHA-256, or holds another number of tokens, another dtype, or a token that is not in the vocabulary.
    """
    remote = manifest.remote
    for last in (remote is None, True):
        with manifest.open_shard(shard) as stream:
            try:
                return _tokens(stream, manifest, shard, block_size, shard.tokens if total is None else total, verify)
            except ShardError as error:
                found = _sha256(stream)
                if not last and remote is not None and found != shard.sha256:
                    remote.discard(shard.sha256, stream)
                    continue
                other = f" (its SHA-256 is {found}, the manifest says {shard.sha256})" if found != shard.sha256 else ""
                raise ShardError(f"{error}{other}", shard.sha256) from error
    raise AssertionError


def _tokens(
    stream: IO[bytes], manifest: Manifest, shard: Shard, block_size: int, total: int, verify: bool
) -> np.ndarray:
    name, record = manifest.shard_name(shard), manifest.record_shape
    there, dtype = os.fstat(stream.fileno()).st_size, np.dtype(manifest.dtype)
    if there > shard.size or shard.tokens * dtype.itemsize * math.prod(record) > shard.size:
        raise ShardError(
            f"shard {name} has {there} bytes, and the manifest says {shard.tokens} tokens in {shard.size}; copy it "
            "again or prepare the data again",
            shard.sha256,
        )
    result = np.full((total, *record), 0 if manifest.raw_bits else manifest.eos_id, dtype=dtype)
    filled = read = 0
    file = ShardFile(stream, shard.size, verify)
    try:
        for document in _documents(file):
            if document.dtype != result.dtype or document.ndim == 0 or document.shape[1:] != record:
                kind = f"{manifest.dtype} {['n', *record]}"
                raise ValueError(f"a document is {document.dtype} {document.shape}, not {kind}")
            if filled + len(document) > total:
                raise ValueError(f"more tokens than the {total} of the manifest")
            result[filled : filled + len(document)] = document
            filled += -(-len(document) // block_size) * block_size
            read += len(document)
        other = verify and file.sha256() != shard.sha256
    except Exception as error:  # whatever bad bytes make tarfile or numpy raise
        if resource_of(error):  # no damage, and nothing to go on without
            raise
        reason = error.args[0] if error.args else type(error).__name__
        raise ShardError(
            f"shard {name} is damaged after {read} of {shard.tokens} tokens, behind byte {file.position} of "
            f"{shard.size}: {reason}; copy it again",
            shard.sha256,
        ) from error
    if filled != total:
        raise ShardError(
            f"shard {name} ends after {read} of {shard.tokens} tokens, at byte {file.position} of {shard.size}; "
            "copy it again or prepare the data again",
            shard.sha256,
        )
    if total and not manifest.raw_bits and int(result.max()) >= manifest.vocab_size:
        raise ShardError(
            f"shard {name} is damaged: token {int(result.max())} is outside the vocabulary of {manifest.vocab_size}; "
            "copy it again or prepare the data again",
            shard.sha256,
        )
    if other:
        raise ShardError(f"shard {name} is damaged; copy it again or prepare the data again", shard.sha256)
    return result


def _sha256(stream: IO[bytes]) -> str:
    try:
        stream.seek(0)
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
    except OSError as error:
        return f"not to be had: {error.strerror}"


def streamed_tokens(manifest: Manifest, split: str, block_size: int) -> np.ndarray:
    """Tokens of each shard of a split when documents are filled up to whole blocks: int64 [shards].

    Raises UserError if the folder has no lengths of documents, or one of them is missing or damaged.
    """
    shards = manifest.split(split).shards
    if block_size == 1:
        return np.array([shard.tokens for shard in shards], dtype=np.int64)
    if any(not shard.lengths_sha256 for shard in shards):
        raise UserError(
            f"data.align_blocks needs the lengths of documents, and {manifest.name} was prepared without them, by an "
            "older version; prepare it again, or set data.align_blocks=false"
        )

    def tokens(shard: Shard, data: bytes) -> int:
        file = lengths_file(shard.file)
        lengths = decode_lengths(data, shard.lengths_sha256, f"{manifest.name}/{file}")
        if lengths.sum(dtype=np.int64) != shard.tokens:
            raise UserError(f"{manifest.name}/{file} is of another shard: prepare the data again")
        return int(aligned(lengths, block_size).sum())

    files = manifest.read_lengths(shards)
    return np.array([tokens(*pair) for pair in zip(shards, files, strict=True)], dtype=np.int64)


class ShardReader:
    """Token arrays of one split's shards; keeps the `capacity` most recently used ones in memory."""

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        capacity: int,
        block_size: int = 1,
        totals: np.ndarray | None = None,
        verify: Verify = "first",
    ):
        """totals: int64 [shards], as `streamed_tokens` says; may be left out with blocks of 1.

        verify: which readings of a shard hash it, as `data.verify` says.
        """
        self.manifest = manifest
        self._shards = manifest.split(split).shards
        self._totals = [shard.tokens for shard in self._shards] if totals is None else totals.tolist()
        self._block_size = block_size
        self._capacity = capacity
        self._verify = verify
        self._verified: set[int] = set()
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()

    def indices(self, damaged: frozenset[str]) -> frozenset[int]:
        """Numbers of the shards with these SHA-256."""
        if not damaged:
            return frozenset()
        return frozenset(i for i, shard in enumerate(self._shards) if shard.sha256 in damaged)

    def __contains__(self, shard: int) -> bool:
        return shard in self._cache

    def tokens(self, shard: int) -> np.ndarray:
        """The tokens of shard number `shard`, 1-D, read only. Raises ShardError as `read_shard` does."""
        if shard in self._cache:
            self._cache.move_to_end(shard)
            return self._cache[shard]
        while len(self._cache) >= self._capacity:  # before reading, so that one window is the limit
            self._cache.popitem(last=False)
        verify = self._verify == "always" or (self._verify == "first" and shard not in self._verified)
        tokens = read_shard(self.manifest, self._shards[shard], self._block_size, self._totals[shard], verify)
        self._verified.add(shard)
        tokens.flags.writeable = False
        self._cache[shard] = tokens
        return tokens

    def fetch_ahead(self, shards: Iterable[int]) -> None:
        """Begin to fetch these shards of a remote folder, and no others any more."""
        if self.manifest.remote is not None:
            chosen = [self._shards[shard] for shard in shards if shard not in self._cache]
            self.manifest.remote.ahead((shard.file, shard.sha256, shard.size) for shard in chosen)
