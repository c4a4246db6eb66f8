"""Shards into token arrays, through webdataset's tar reading, with one window of shards in memory."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_bit.data.manifest import Manifest
from megatron_bit.errors import UserError

TOKENS_SUFFIX = "tokens.npy"


def read_documents(path: Path) -> Iterator[np.ndarray]:
    """The token arrays of a shard's documents, [n] or records [n, bytes], in the order they were written.

    Uses webdataset's tar stages and not its `WebDataset` pipeline: that one splits shards by rank from the
    environment, leaves files open and cuts a path at `#` or `?`; which shard is read when is ours to say.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with open(path, "rb") as stream:
        source = [{"url": str(path), "stream": stream}]
        members = tar_file_expander(source, select_files=lambda name: name.endswith(TOKENS_SUFFIX))
        for sample in group_by_keys(members):
            yield np.lib.format.read_array(io.BytesIO(sample[TOKENS_SUFFIX]), allow_pickle=False)


def read_shard(path: Path, tokens: int, dtype: str, vocab_size: int, raw_bits: int = 0) -> np.ndarray:
    """All tokens of a shard, its documents one after the other: [tokens] of `dtype`; records [tokens, bytes] of uint8.

    Raises UserError naming the shard if it cannot be read to its end, or holds another number of tokens,
    another dtype, or a token that is not in the vocabulary.
    """
    record = (-(-raw_bits // 8),) if raw_bits else ()
    result = np.empty((tokens, *record), dtype=np.dtype(dtype))
    filled = 0
    try:
        for document in read_documents(path):
            if document.dtype != result.dtype or document.ndim == 0 or document.shape[1:] != record:
                raise ValueError(f"a document is {document.dtype} {document.shape}, not {dtype} {['n', *record]}")
            if filled + len(document) > tokens:
                raise ValueError(f"more tokens than the {tokens} of the manifest")
            result[filled : filled + len(document)] = document
            filled += len(document)
    except Exception as error:  # whatever bad bytes make tarfile, webdataset or numpy raise
        reason = error.args[0] if error.args else type(error).__name__
        raise UserError(
            f"shard {path} is damaged after {filled} of {tokens} tokens: {reason}; copy it again"
        ) from error
    if filled != tokens:
        raise UserError(f"shard {path} ends after {filled} of {tokens} tokens; copy it again or prepare the data again")
    if raw_bits:
        return result
    if tokens and int(result.max()) >= vocab_size:
        raise UserError(
            f"shard {path} is damaged: token {int(result.max())} is outside the vocabulary of {vocab_size}; "
            "copy it again or prepare the data again"
        )
    return result


class ShardReader:
    """Token arrays of one split's shards; keeps the `capacity` most recently used ones in memory."""

    def __init__(self, manifest: Manifest, split: str, capacity: int):
        # Here and not at the first read, which happens in the prefetch thread: webdataset imports torch,
        # and two threads importing torch at once can see half of it.
        import webdataset.tariterators  # noqa: F401

        self._manifest = manifest
        self.record_shape = manifest.record_shape
        self._shards = manifest.split(split).shards
        self._capacity = capacity
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()

    def __contains__(self, shard: int) -> bool:
        return shard in self._cache

    def tokens(self, shard: int) -> np.ndarray:
        """The tokens of shard number `shard`, as `read_shard` has them and read only. Raises UserError as it does."""
        if shard in self._cache:
            self._cache.move_to_end(shard)
            return self._cache[shard]
        while len(self._cache) >= self._capacity:  # before reading, so that one window is the limit
            self._cache.popitem(last=False)
        entry = self._shards[shard]
        path = self._manifest.shard_path(entry)
        m = self._manifest
        tokens = read_shard(path, entry.tokens, m.dtype, m.vocab_size, m.raw_bits)
        tokens.flags.writeable = False
        self._cache[shard] = tokens
        return tokens
