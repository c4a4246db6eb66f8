"""Which documents are left out, by rules that know no language. All are off unless given a limit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_bit.errors import UserError

NGRAM = 5
LINE_END = re.compile(r"\r\n|\n|\r")  # str.splitlines cuts at form feeds, U+2028 and others too
SYMBOL = re.compile(r"#|\.\.\.|\u2026")
BROKEN = "damaged"  # reasons that are no filter's
EMPTY = "empty"
EXACT_DUPLICATE = "exact duplicate"
NEAR_DUPLICATE = "near duplicate"


@dataclass(frozen=True)
class Filters:
    """Limits; None is off. Words are what white space separates, lengths are characters.

    The four ratios are rules of Rae et al., Scaling Language Models (Gopher), arXiv:2112.11446, table A1, with the
    values used there in brackets.
    """

    min_chars: int | None = None
    max_chars: int | None = None
    min_alpha_fraction: float | None = None  # of the words that have a letter in them (0.8)
    max_symbol_ratio: float | None = None  # "#" and ellipses for each word (0.1)
    max_duplicate_lines: float | None = None  # lines that stood before in the document, of its lines (0.3)
    max_repeated_ngrams: float | None = None  # characters in 5-grams of words that stood before, of all (0.15)

    def check(self) -> None:
        """Raises UserError for a limit that is out of range, or limits that leave nothing."""
        for name in ("min_chars", "max_chars"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.min_chars is not None and self.max_chars is not None and self.min_chars > self.max_chars:
            raise UserError(f"min_chars is {self.min_chars}, above max_chars {self.max_chars}: nothing would be left")
        for name in ("min_alpha_fraction", "max_symbol_ratio", "max_duplicate_lines", "max_repeated_ngrams"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name} is {value}; it must be in 0 <= x <= 1")

    def given(self) -> dict[str, float]:
        """The limits that are on."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def reason(self, text: str) -> str | None:
        """The name of the first limit that the text breaks, or None if it stays."""
        if self.min_chars is not None and len(text) < self.min_chars:
            return "min_chars"
        if self.max_chars is not None and len(text) > self.max_chars:
            return "max_chars"
        words: list[str] = []
        if not (self.min_alpha_fraction is self.max_symbol_ratio is self.max_repeated_ngrams is None):
            words = text.split()
        if self.min_alpha_fraction is not None and alpha_fraction(words) < self.min_alpha_fraction:
            return "min_alpha_fraction"
        if self.max_symbol_ratio is not None and symbol_ratio(text, words) > self.max_symbol_ratio:
            return "max_symbol_ratio"
        if self.max_duplicate_lines is not None and duplicate_lines(text) > self.max_duplicate_lines:
            return "max_duplicate_lines"
        if self.max_repeated_ngrams is not None and repeated_ngrams(words) > self.max_repeated_ngrams:
            return "max_repeated_ngrams"
        return None


def alpha_fraction(words: Sequence[str]) -> float:
    """Share of the words with a letter of any script in them."""
    return sum(any(map(str.isalpha, word)) for word in words) / max(1, len(words))


def symbol_ratio(text: str, words: Sequence[str]) -> float:
    """Number signs and ellipses, for each word."""
    return len(SYMBOL.findall(text)) / max(1, len(words))


def duplicate_lines(text: str) -> float:
    """Share of the lines that are not blank and stood before in the text."""
    lines = [line.strip() for line in LINE_END.split(text) if line.strip()]
    return (len(lines) - len(set(lines))) / max(1, len(lines))


def repeated_ngrams(words: Sequence[str]) -> float:
    """Share of the words' characters that lie in a 5-gram of words which occurs more than once, but for its first."""
    ngrams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    if len(set(ngrams)) == len(ngrams):
        return 0.0
    seen: set[tuple[str, ...]] = set()
    repeated = bytearray(len(words))
    for i, ngram in enumerate(ngrams):
        if ngram in seen:
            repeated[i : i + NGRAM] = b"\1" * NGRAM
        seen.add(ngram)
    lengths = [len(word) for word in words]
    return sum(length for length, again in zip(lengths, repeated, strict=True) if again) / sum(lengths)


def add_counts(total: Counter[str], more: dict[str, int]) -> None:
    """Only what was found is named."""
    total.update({name: count for name, count in more.items() if count})
