"""The search for a code: exchange tokens' codes until the bits that follow a token are as sure as they can be.

What is made small is F = sum_u n(u) sum_j H(bit_j | u) over the pairs counted in the training text, u the token before:
the cost of deciding the bits apart, but for H(token | u), which no code changes. F is a sum over bits, so what flipping
bit j of a token alone would change is known for all tokens and bits in one pass over the pairs (A [V, B]), and moving a
token from code c to c ^ m changes it by the sum of A over the bits of m: all tokens against many masks m are one matrix
product. A token moves to a free code, or two exchange theirs, so codes stay distinct.

Simulated annealing in parallel: in every sweep each token draws one of its moves with the Boltzmann weights of their
gains, and accepts it or stays by the same. Moves of one sweep do not know of each other, which at high temperature does
not matter; the last tenth of the sweeps only takes the best tenth of what helps. The best code seen is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from mbit_data.bigrams import Bigrams

HOT, COLD = 0.4, 0.025  # first and last temperature, in nats times the mean count of a token
GREEDY = 0.1  # share of the sweeps, at the end, and of the tokens that may move in one of those
MOVES = 0.5  # of the tokens, at most, in a sweep
PRIOR = 1.0  # counts of the unigram distribution added to every context: what was seen once is not sure
CHUNK = 1 << 18  # pairs at a time
MAX_BITS = 24  # of a learned code: there is a table of all 2^B codes


def anneal(pairs: Bigrams, bits: int, sweeps: int, seed: int, advance: Callable[[], object]) -> np.ndarray:
    """int64 [V] distinct codes below 2^bits, the most telling bit first: the one that the token before decides most.

    A function of its arguments alone, `advance` aside, which is called after each sweep. One thread, whatever the
    machine has: a sum in another order may decide a draw differently.
    """
    assert pairs.vocab_size <= 1 << bits <= 1 << MAX_BITS, (pairs.vocab_size, bits)
    with _one_thread():
        search = _Search(pairs, bits)
        random = np.random.default_rng(seed)
        words, best, least = search.by_frequency(), None, np.inf
        hot_sweeps = sweeps - int(GREEDY * sweeps)
        for sweep in range(sweeps + 1):
            gains, cost = search.flips(words)
            if cost < least:
                best, least = words.copy(), cost
            if sweep == sweeps:
                break
            heat = search.unit * HOT * (COLD / HOT) ** (sweep / hot_sweeps) if sweep < hot_sweeps else 0.0
            search.move(words, gains, heat, random)
            advance()
        assert best is not None
        return search.telling_first(best)


class _Search:
    """The pairs in the order the passes want them, and the two halves of a sweep."""

    def __init__(self, pairs: Bigrams, bits: int) -> None:
        size = pairs.vocab_size
        self.bits, self.size = bits, size
        self.unit = pairs.total / size
        frequency = np.bincount(pairs.following, weights=pairs.count, minlength=size)
        self.frequency = frequency
        self.unigram = torch.from_numpy((frequency + 0.5) / (frequency + 0.5).sum()).float()
        self.counts = pairs.matrix(pairs.count, torch.float32)
        self.contexts = torch.from_numpy(np.bincount(pairs.previous, weights=pairs.count, minlength=size)) + PRIOR
        order = np.lexsort((pairs.previous, pairs.following))  # a token's pairs side by side
        self.previous = torch.from_numpy(pairs.previous[order])
        self.following = torch.from_numpy(pairs.following[order])
        self.count = torch.from_numpy(pairs.count[order]).float()[:, None]
        self.seen, starts = np.unique(pairs.following[order], return_index=True)
        self.starts = np.append(starts, len(order))
        self.masks = int(np.clip((1 << 22) // size, 16, 128))

    def by_frequency(self) -> np.ndarray:
        """Where the search begins: the rank of the token's frequency."""
        words = np.empty(self.size, np.int64)
        words[np.argsort(-self.frequency, kind="stable")] = np.arange(self.size)
        return words

    def flips(self, words: np.ndarray) -> tuple[np.ndarray, float]:
        """(float64 [V, B]: what F loses when bit j of a token alone is flipped, F), in nats times counts.

        A count n that leaves a mass M changes x ln x there by n (ln(M - n / 2) + 1) up to third order in n / M: one
        logarithm for both masses, exact enough beside the noise of annealing, and no cancellation in float32.
        """
        ones = torch.from_numpy((words[:, None] >> np.arange(self.bits)) & 1).float()
        mass = self.counts @ ones + PRIOR * (self.unigram @ ones)  # [u, j]: of the tokens after u with bit j
        context = self.contexts[:, None]
        high = mass.double()
        low = (context - high).clamp_min(0)
        cost = float((torch.xlogy(context, context) - torch.xlogy(high, high) - torch.xlogy(low, low)).sum())
        sign = 1 - 2 * ones
        total = self.contexts.float()
        gains = np.zeros((self.size, self.bits))
        for first, last in self._chunks():
            begin, end = self.starts[first], self.starts[last]
            u, n = self.previous[begin:end], self.count[begin:end]
            middle = torch.addcmul(mass[u], sign[self.following[begin:end]], n, value=0.5)
            rest = (total[u][:, None] - middle).clamp_min_(1e-4)
            change = middle.clamp_min_(1e-4).div_(rest).log_().mul_(n)
            gains[self.seen[first:last]] = np.add.reduceat(change.numpy(), self.starts[first:last] - begin, axis=0)
        return gains * sign.numpy(), cost

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """Runs of tokens whose pairs are about CHUNK together."""
        first = 0
        while first < len(self.seen):
            last = int(np.searchsorted(self.starts, self.starts[first] + CHUNK, "right")) - 1
            last = min(max(last, first + 1), len(self.seen))
            yield first, last
            first = last

    def move(self, words: np.ndarray, gains: np.ndarray, heat: float, random: np.random.Generator) -> None:
        """Change `words` in place: a draw at temperature `heat`, or at 0 the best of what helps."""
        codes, everyone = 1 << self.bits, np.arange(self.size)
        holder = np.full(codes, -1)
        holder[words] = everyone
        masks = random.choice(codes - 1, min(self.masks, codes - 1), replace=False) + 1
        digits = torch.from_numpy(((masks[None, :] >> np.arange(self.bits)[:, None]) & 1).astype(np.float64))
        alone = (torch.from_numpy(gains) @ digits).numpy()
        others = holder[words[:, None] ^ masks[None, :]]
        together = alone + np.where(others >= 0, alone[np.maximum(others, 0), np.arange(len(masks))], 0.0)
        drawn = together - heat * np.log(random.standard_exponential(together.shape)) if heat else together
        choice = drawn.argmax(1)
        gain, other, target = together[everyone, choice], others[everyone, choice], words ^ masks[choice]
        if heat:
            accepted = random.random(self.size) * (1 + np.exp(np.clip(-gain / heat, -50, 50))) < 1
            candidates, most = random.permutation(np.flatnonzero(accepted)), int(MOVES * self.size)
        else:
            candidates, most = np.flatnonzero(gain > 1e-6 * self.unit), int(GREEDY * self.size)
            candidates = candidates[np.argsort(-gain[candidates], kind="stable")]
        moved, taken, done = np.zeros(self.size, bool), set(), 0
        for token in candidates.tolist():
            partner, code = other[token], int(target[token])
            if moved[token] or (partner >= 0 and moved[partner]) or code in taken:
                continue
            if partner >= 0:
                words[partner], moved[partner] = words[token], True
                taken.add(int(words[token]))
            words[token], moved[token] = code, True
            taken.add(code)
            done += 1
            if done >= max(1, most):
                break

    def telling_first(self, words: np.ndarray) -> np.ndarray:
        """The same bits in another order: I(bit; token before) falls from the first to the last."""
        ones = torch.from_numpy((words[:, None] >> np.arange(self.bits)) & 1).double()
        mass = (self.counts.double() @ ones) + PRIOR * (self.unigram.double() @ ones)
        context = self.contexts[:, None]
        rest = (context - mass).clamp_min(0)
        entropy = (torch.xlogy(context, context) - torch.xlogy(mass, mass) - torch.xlogy(rest, rest)).sum(0)
        whole, high = self.contexts.sum(), mass.sum(0)
        alone = torch.xlogy(whole, whole) - torch.xlogy(high, high) - torch.xlogy(whole - high, whole - high)
        order = np.argsort(-(alone - entropy).numpy(), kind="stable")
        digits = (words[:, None] >> order) & 1
        return (digits << np.arange(self.bits - 1, -1, -1)).sum(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
