"""What two documents have in common if they are the same (exact) or almost the same (near): keys of 64 bits.

Near is MinHash with banding (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.3 - 3.4) with
the sizes of FineWeb (Penedo et al., arXiv:2406.17557, 3.4): 5-grams of words, 14 bands of 8 minima. Documents of
Jaccard similarity s share a band with probability 1 - (1 - s^8)^14: 0.05 at 0.5, 0.56 at 0.7, 0.92 at 0.8, 1.00 at 0.9.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from typing import Literal

import numpy as np

Dedup = Literal["exact", "near"]
DEDUP = ("exact", "near")
NGRAM = 5
BANDS, ROWS = 14, 8
CHUNK = 256  # shingles at a time: [112, 256] uint64 is 229 KB, which a core's cache holds
# Scripts without spaces between words: there a character counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
# raw words: numpy promises that they stay the same, but not what its distributions make of them
_RANDOM = np.random.PCG64(20260).random_raw(2 * BANDS * ROWS + max(NGRAM, ROWS))
_A = _RANDOM[: BANDS * ROWS, None] | np.uint64(1)
_B = _RANDOM[BANDS * ROWS : 2 * BANDS * ROWS, None]
_PLACE = _RANDOM[2 * BANDS * ROWS :] | np.uint64(1)


def key_count(dedup: Dedup) -> int:
    """Keys of a document; two documents are linked if one of them is equal, except the pair of `exact`."""
    return 2 if dedup == "exact" else BANDS


def exact_keys(text: str) -> np.ndarray:
    """uint64 [2]: 128 bits of the SHA-256 of the text in Unicode form NFC, every run of white space one space."""
    normal = " ".join(unicodedata.normalize("NFC", text).split())
    return np.frombuffer(hashlib.sha256(normal.encode()).digest()[:16], dtype="<u8")


def near_keys(text: str) -> np.ndarray:
    """uint64 [14]: one hash for each band of minima."""
    minima = signature(text).reshape(BANDS, ROWS)
    with np.errstate(over="ignore"):
        return _mix((minima * _PLACE[:ROWS]).sum(axis=1, dtype=np.uint64))


def signature(text: str) -> np.ndarray:
    """uint64 [112]: the smallest value of each hash function over the text's 5-grams of words.

    Words are letters and digits of the text in form NFKC without case; fewer than five words are one shingle.
    """
    words = WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    if not words:  # nothing but punctuation: alike only if equal
        words = [text]
    known: dict[str, int] = {}
    hashes = np.array([known.get(w) or known.setdefault(w, _word_hash(w)) for w in words], dtype=np.uint64)
    count = max(1, len(hashes) - NGRAM + 1)
    with np.errstate(over="ignore"):
        shingles = np.zeros(count, dtype=np.uint64)
        for place in range(min(NGRAM, len(hashes))):
            shingles += hashes[place : place + count] * _PLACE[place]
        shingles = np.unique(_mix(shingles))
        result = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, dtype=np.uint64)
        for begin in range(0, len(shingles), CHUNK):
            np.minimum(result, (shingles[begin : begin + CHUNK] * _A + _B).min(axis=1), out=result)
    return result


def _word_hash(word: str) -> int:
    data = word.encode()
    return zlib.crc32(data) | zlib.adler32(data[::-1]) << 32


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): every bit of x moves all of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
