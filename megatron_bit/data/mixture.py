"""Which of several sources sample number n is taken from: a pure function of n and the shares, exact and even.

A source of share a among b is due at n if floor((n + 1) a / b) exceeds floor(n a / b), and floor(n a / b) samples of it
came before: no state, no drift, and exactly a of every b samples. What is not of the first source is numbered anew and
divided among the others in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


class Mixture:
    """Divides the integers 0, 1, 2, ... among sources."""

    def __init__(self, shares: Sequence[Fraction | int]):
        """shares: positive, relative to each other."""
        if not shares or min(shares) <= 0:
            raise ValueError(f"shares {shares} have to be positive")
        scale = math.lcm(*(Fraction(share).denominator for share in shares))
        whole = [int(Fraction(share) * scale) for share in shares]
        divisor = math.gcd(*whole)
        self.shares = [share // divisor for share in whole]  # so many of every `sum(shares)` samples

    def divide(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, how many of it came before) of the samples with these numbers: int64 [n] each."""
        rest = np.asarray(numbers, dtype=np.int64).astype(object)  # Python's integers: a product must not overflow
        source = np.full(len(rest), len(self.shares) - 1, dtype=np.int64)
        before = rest.copy()
        left, open_ = sum(self.shares), np.arange(len(rest))
        for number, share in enumerate(self.shares[:-1]):
            earlier = rest * share // left
            taken = ((rest + 1) * share // left > earlier).astype(bool)
            source[open_[taken]], before[open_[taken]] = number, earlier[taken]
            rest, open_ = (rest - earlier)[~taken], open_[~taken]
            before[open_] = rest
            left -= share
        return source, before.astype(np.int64)

    def before(self, number: int) -> list[int]:
        """How many samples of each source there are before sample `number`."""
        counts, rest, left = [], number, sum(self.shares)
        for share in self.shares:
            counts.append(rest * share // left)
            rest, left = rest - counts[-1], left - share
        return counts
