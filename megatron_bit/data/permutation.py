"""Stateless keyed permutations of the integers 0 .. size-1: order without a shuffled list in memory.

All of it is integer arithmetic written out here, so that an order does not change with the numpy version
(numpy keeps the stream of its generators only within a version).
"""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 6  # 4 suffice for a pseudo-random permutation (Luby and Rackoff); small domains mix worse


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from the parts, equal on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def mix(values: np.ndarray, key: int) -> np.ndarray:
    """splitmix64's finalizer over uint64 [n], keyed; wraps modulo 2**64."""
    values = values ^ np.uint64(key)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def keyed_order(size: int, key: int) -> np.ndarray:
    """A permutation of 0 .. size-1 as int64 [size]: for short lists, such as shards."""
    return np.argsort(mix(np.arange(size, dtype=np.uint64), key), kind="stable").astype(np.int64)


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where each index goes: a bijection of 0 .. size-1 in constant memory.

    A Feistel network permutes the next even power of two; an index that lands outside goes through again
    until it lands inside (cycle walking, fewer than 4 rounds expected). indices: int64 [n] in 0 .. size-1.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    round_keys = [derive_key("feistel", key, i) for i in range(ROUNDS)]

    def encrypt(values: np.ndarray) -> np.ndarray:
        left, right = values >> shift, values & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix(right, round_key) & mask)
        return (left << shift) | right

    result = encrypt(np.asarray(indices).astype(np.uint64))
    outside = result >= np.uint64(size)
    while outside.any():
        result[outside] = encrypt(result[outside])
        outside = result >= np.uint64(size)
    return result.astype(np.int64)
