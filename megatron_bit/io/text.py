"""Text that is not ours, where it would act: in a terminal, in a script, in a header. Imports no torch."""

from __future__ import annotations

import unicodedata

# control characters, line and paragraph separators, halves of surrogate pairs, and what turns the direction of text
_ACTING = {"Cc", "Zl", "Zp", "Cs", "Cf"}


def acts(text: str) -> bool:
    """Whether a character of it is not shown but acted on: a line break, an escape sequence."""
    return any(unicodedata.category(c) in _ACTING for c in text)


def shown(text: object) -> str:
    """As it can be printed on one line of a terminal: what would act is escaped."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _ACTING else c for c in str(text))
