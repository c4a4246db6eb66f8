"""Shards into token arrays, through webdataset's tar reading, with one window of shards in memory."""

from __future__ import annotations

import io
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from megatron_bit.data.documents import aligned, decode_lengths
from megatron_bit.data.manifest import Manifest, Shard, lengths_file
from megatron_bit.errors import ShardError, UserError

TOKENS_SUFFIX = "tokens.npy"


def read_documents(path: Path) -> Iterator[np.ndarray]:
    """The token arrays of a shard's documents, [n] or records [n, bytes], in the order they were written."""
    with open(path, "rb") as stream:
        yield from _documents(stream)


def _documents(stream: IO[bytes]) -> Iterator[np.ndarray]:
    """Uses webdataset's tar reading and not its `WebDataset` pipeline: that one splits shards by rank from the
    environment, leaves files open and cuts a path at `#` or `?`; which shard is read when is ours to say.
    """
    from webdataset.tariterators import tar_file_iterator

    for member in tar_file_iterator(stream, select_files=lambda name: name.endswith(TOKENS_SUFFIX)):  # type: ignore[arg-type]
        yield decode_array(member["data"])


_ARRAY = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '<u([24])', 'fortran_order': False, 'shape': \((\d+),\), \} *\n", re.DOTALL
)


def decode_array(data: bytes) -> np.ndarray:
    """What numpy reads from a .npy file in memory. Raises ValueError.

    numpy compiles the header as Python, 50 us for each document; one that `prepare` has written is matched instead.
    """
    header = _ARRAY.match(data)
    if header is not None:
        count, size, begin = int(header[3]), int(header[2]), header.end()
        if begin == 10 + int.from_bytes(header[1], "little") and len(data) == begin + count * size:
            return np.frombuffer(data, dtype=f"<u{size}", offset=begin)
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def read_shard(manifest: Manifest, shard: Shard, block_size: int = 1, total: int | None = None) -> np.ndarray:
    """All tokens of a shard, document after document: [total] of the manifest's dtype, of records [total, bytes].

    Args:
        block_size: fill every document up to whole blocks with end-of-document tokens.
        total: tokens with those, as `streamed_tokens` says; may be left out with blocks of 1.

    Raises ShardError naming the shard, and how far it could be read, if it cannot be had or read to its end, or holds
    another number of tokens, another dtype, or a token that is not in the vocabulary.
    """
    name, total = manifest.shard_name(shard), shard.tokens if total is None else total
    record, empty = manifest.record_shape, 0 if manifest.raw_bits else manifest.eos_id
    result = np.full((total, *record), empty, dtype=np.dtype(manifest.dtype))
    filled = read = byte = 0
    with manifest.open_shard(shard) as stream:
        try:
            for document in _documents(stream):
                if document.dtype != result.dtype or document.ndim == 0 or document.shape[1:] != record:
                    kind = f"{manifest.dtype} {['n', *record]}"
                    raise ValueError(f"a document is {document.dtype} {document.shape}, not {kind}")
                if filled + len(document) > total:
                    raise ValueError(f"more tokens than the {total} of the manifest")
                result[filled : filled + len(document)] = document
                filled += -(-len(document) // block_size) * block_size
                read, byte = read + len(document), stream.tell()
        except Exception as error:  # whatever bad bytes make tarfile, webdataset or numpy raise
            reason = error.args[0] if error.args else type(error).__name__
            raise ShardError(
                f"shard {name} is damaged after {read} of {shard.tokens} tokens, behind byte {byte} of {shard.size}: "
                f"{reason}; copy it again",
                shard.sha256,
            ) from error
    if filled != total:
        raise ShardError(
            f"shard {name} ends after {read} of {shard.tokens} tokens, at byte {byte} of {shard.size}; copy it again "
            "or prepare the data again",
            shard.sha256,
        )
    if total and not manifest.raw_bits and int(result.max()) >= manifest.vocab_size:
        raise ShardError(
            f"shard {name} is damaged: token {int(result.max())} is outside the vocabulary of {manifest.vocab_size}; "
            "copy it again or prepare the data again",
            shard.sha256,
        )
    return result


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
        self, manifest: Manifest, split: str, capacity: int, block_size: int = 1, totals: np.ndarray | None = None
    ):
        """totals: int64 [shards], as `streamed_tokens` says; may be left out with blocks of 1."""
        # Here and not at the first read, which happens in the prefetch thread: webdataset imports torch,
        # and two threads importing torch at once can see half of it.
        import webdataset.tariterators  # noqa: F401

        self.manifest = manifest
        self._shards = manifest.split(split).shards
        self._totals = [shard.tokens for shard in self._shards] if totals is None else totals.tolist()
        self._block_size = block_size
        self._capacity = capacity
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
        tokens = read_shard(self.manifest, self._shards[shard], self._block_size, self._totals[shard])
        tokens.flags.writeable = False
        self._cache[shard] = tokens
        return tokens

    def fetch_ahead(self, shards: Iterable[int]) -> None:
        """Begin to fetch these shards of a remote folder, and no others any more."""
        if self.manifest.remote is not None:
            chosen = [self._shards[shard] for shard in shards if shard not in self._cache]
            self.manifest.remote.ahead((shard.file, shard.sha256, shard.size) for shard in chosen)
