"""Where documents begin and end: in a batch by their end-of-document tokens, in a shard by a sidecar of their lengths.

A document is aligned when it is filled up with end-of-document tokens to whole blocks of K tokens, so that the next one
begins with a block. How many tokens a shard has then is known from the lengths, before any shard is read.
"""

from __future__ import annotations

import hashlib
import io

import numpy as np

from megatron_bit.data.npy import decode_array
from megatron_bit.errors import UserError


def document_starts(tokens: np.ndarray, eos_id: int, block_size: int) -> np.ndarray:
    """Where the document of each token begins in its sample: int64 [n, S] ids to int64 [n, S].

    In whole blocks: a block begins a document if the block before it has an end of one. So a block may be told by the
    blocks before it, which is all that is known when its tokens are decided; with aligned documents it is exact.
    """
    ended = (tokens == eos_id).reshape(len(tokens), -1, block_size).any(-1)
    block = np.arange(ended.shape[1])
    begins = np.zeros_like(ended)
    begins[:, 1:] = ended[:, :-1]
    first = np.maximum.accumulate(np.where(begins, block, 0), axis=1)
    return np.repeat(first * block_size, block_size, axis=1)


def aligned(lengths: np.ndarray, block_size: int) -> np.ndarray:
    """Tokens of each document in whole blocks: int64 [documents]."""
    return -(-lengths.astype(np.int64) // block_size) * block_size


def encode_lengths(lengths: list[int]) -> bytes:
    """A sidecar: uint32 [documents], the tokens of each document in the shard's order, its end among them."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(lengths, dtype=np.uint32), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def decode_lengths(data: bytes, sha256: str, name: str) -> np.ndarray:
    """uint32 [documents]. Raises UserError if it is not the file that the manifest means."""
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise UserError(f"{name} is damaged: SHA-256 {digest}, the manifest says {sha256}; copy it again")
    return decode_array(data)
