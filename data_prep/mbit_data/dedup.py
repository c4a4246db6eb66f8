"""Which document of a set of copies stays. Two passes: keys of all documents to a file, then one number for each.

Copies are documents that are linked, directly or through others (connected components). Of each set the one stays
whose text has the smallest SHA-256, of equal texts the first; so neither the order of the files nor the number of
workers decides which text stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from mbit_data.minhash import Dedup, key_count
from megatron_bit.errors import UserError
from megatron_bit.io.files import PARTIAL, sync_folder

RANK_WORDS = 2  # 128 bits of the text's SHA-256, in front of the keys


def record_words(dedup: Dedup) -> int:
    """uint64 words of one document in a key file: 32 bytes (exact) or 128 (near)."""
    return RANK_WORDS + key_count(dedup)


def write_keys(path: Path, records: Iterable[np.ndarray]) -> None:
    """One record for each document, in order; a document left out by a filter is all zeros. Raises OSError."""
    partial = path.with_name(path.name + PARTIAL)
    with open(partial, "wb") as file:
        for record in records:
            file.write(record.astype("<u8").tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def choose(paths: list[Path], dedup: Dedup, progress: Callable[[str], None] = lambda text: None) -> np.ndarray:
    """For each document of the key files, one file after the other: bool [documents], True for a copy to leave out.

    Memory: about 100 bytes a document; the files are read a column at a time. Raises UserError for a file cut short.
    """
    words = record_words(dedup)
    files = [_open_keys(path, words) for path in paths]
    high, low = (_column(files, place) for place in range(RANK_WORDS))
    present = (high != 0) | (low != 0)
    order = np.lexsort((low, high))  # stable: equal texts stay in their order
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    del high, low, order
    label = rank.copy()
    places = range(RANK_WORDS, words)
    rounds = 0
    changed = True
    while changed:  # the smallest rank spreads over each component; a round is a sort of every key column
        changed = False
        for place in places if dedup == "near" else (None,):
            order, starts = _groups(files, place, present)
            smallest = np.minimum.reduceat(label[order], starts) if len(order) else label[:0]
            spread = np.repeat(smallest, np.diff(np.append(starts, len(order))))
            if not np.array_equal(spread, label[order]):
                label[order] = spread
                changed = dedup == "near"  # one column is settled at once
        rounds += 1
        progress(f"round {rounds}: {int((label != rank)[present].sum()):,} copies")
    return (label != rank) & present


def _open_keys(path: Path, words: int) -> np.ndarray:
    size = path.stat().st_size
    if size % (8 * words):
        raise UserError(f"{path} is damaged: {size} bytes are no whole number of records; remove it and run again")
    if not size:  # an empty file cannot be mapped
        return np.empty((0, words), dtype="<u8")
    return np.memmap(path, dtype="<u8", mode="r").reshape(-1, words)


def _column(files: list[np.ndarray], place: int) -> np.ndarray:
    return np.concatenate([np.asarray(file[:, place]) for file in files])


def _groups(files: list[np.ndarray], place: int | None, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(documents sorted by key, where a new key begins); `place` None is the pair of keys of `exact`."""
    documents = np.flatnonzero(present)
    if place is None:
        high, low = (_column(files, RANK_WORDS + i)[documents] for i in range(2))
        order = np.lexsort((low, high))
        new = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
    else:
        keys = _column(files, place)[documents]
        order = np.argsort(keys, kind="stable")
        new = np.diff(keys[order]) != 0
    starts = np.flatnonzero(np.concatenate([[True], new])) if len(order) else np.empty(0, dtype=np.int64)
    return documents[order], starts
