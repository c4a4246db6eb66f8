"""Ids to text, piece by piece and behind a prompt, for any tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character, or none yet
# Bytes that show what of a text is not final: one that is in no character, what may complete one that has begun, and
# one that is a character.
_NEXT_BYTES = ((0xFF,), (0x80,), (0x80, 0x80), (0x80, 0x80, 0x80), (0xA0, 0x80), (0x90, 0x80, 0x80), (0x41,))


def common(a: str, b: str) -> int:
    """Length of the longest beginning that both have."""
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


class Decoder:
    """Token ids to text, and how far the text of some ids is final whatever token comes next.

    A token has no text of its own: its space may be that of a text's beginning, its bytes may be a part of a
    character, and in some tokenizers one wrong byte spoils the right ones beside it. Nothing here knows which
    tokenizer it is.
    """

    def __init__(self, decode: Callable[[list[int]], str], id_of: Callable[[str], Any] | None = None) -> None:
        """
        Args:
            decode: ids to text, without special tokens, and nothing cleaned up.
            id_of: the id of a token by its name; what it returns for a name that is none does not matter.
        """
        self.decode = decode
        found = {byte: self._byte(byte, id_of) for byte in (0x41, 0x80, 0x90, 0xA0, 0xFF)} if id_of is not None else {}
        known = [[found.get(byte) for byte in following] for following in _NEXT_BYTES]
        self._probes = [[i for i in ids if i is not None] for ids in known if None not in ids]
        self._closes: dict[int, bool] = {}

    @classmethod
    def of(cls, tokenizer: Any) -> Decoder:
        """Of a tokenizer with transformers' methods."""

        def decode(ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

        return cls(decode, getattr(tokenizer, "convert_tokens_to_ids", None))

    def _byte(self, byte: int, id_of: Callable[[str], Any]) -> int | None:
        """The token of one of these bytes: by its number, or by the letter that byte-level vocabularies give it."""
        letter = chr(byte) if byte in (0x41, 0xFF) else chr(0x122 + byte - 0x80)
        for name in (f"<0x{byte:02X}>", letter):
            token = id_of(name)
            if isinstance(token, int) and token >= 0 and self.decode([token]) == ("A" if byte == 0x41 else REPLACEMENT):
                return token
        return None

    def behind(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """The text of `new` behind `prompt`: what the text of both has behind that of the prompt.

        Where the text of both does not begin with the prompt's (which ends inside a character, say, that `new`
        completes), it is what follows the part that they share.
        """
        before, both = self.decode([*prompt]), self.decode([*prompt, *new])
        return both[common(before, both) :]

    def closes(self, token: int) -> bool:
        """Whether a text that ends with this token is final, whatever was before and whatever comes."""
        if token not in self._closes:
            own = self.decode([token])
            kept = (self.decode([token, *ids]).startswith(own) for ids in self._probes)
            self._closes[token] = bool(own) and not own.endswith(REPLACEMENT) and all(kept)
        return self._closes[token]

    def final(self, ids: list[int], text: str) -> int:
        """How many characters of `text`, the text of `ids`, are final."""
        count = len(text)
        for following in self._probes:
            count = min(count, common(text, self.decode([*ids, *following])))
        if len(self._probes) < len(_NEXT_BYTES):  # not all of them are tokens: three bytes are the most of a beginning
            count -= min(3, count - len(text[:count].rstrip(REPLACEMENT)))
        return count

    def alike(self, some: list[int], others: list[int]) -> bool:
        """Whether bytes mean the same behind both."""
        a, b = self.decode(some), self.decode(others)
        for ids in self._probes:
            x, y = self.decode([*some, *ids]), self.decode([*others, *ids])
            if x[common(a, x) :] != y[common(b, y) :]:
                return False
        return True

    def tail(self, ids: Sequence[int]) -> list[int]:
        """The end of `ids`, as much as the text behind them depends on: from a whole character, and not only spaces."""
        size = 8
        while size < len(ids):
            start = len(ids) - size
            if self.closes(ids[start - 1]) and self.decode([*ids[start:]]).strip(" "):
                return [*ids[start:]]
            size += 1 if size < 64 else size
        return [*ids]


class Detokenizer:
    """The text of tokens behind a prompt, piece by piece: together the pieces are `Decoder.behind` of all tokens.

    What is out is never taken back: what a later token could change is held until none can. A token costs a few calls
    of `decode` with a few ids each, however long the text is.
    """

    def __init__(self, decoder: Decoder, prompt: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._before = decoder.tail(prompt)  # ids on which the text behind them may depend
        self._out = decoder.decode(self._before)  # text of `before` and of `new` that is out, or the prompt's
        self._new: list[int] = []
        self._wait = 0  # tokens that are held until it is tried again
        self.pending = ""  # text that is held, without characters that are not whole

    def add(self, *tokens: int) -> str:
        """The text that has become final."""
        self._new += tokens
        closed = self._decoder.closes(self._new[-1])
        if not closed and len(self._new) < self._wait:
            return ""
        ids = [*self._before, *self._new]
        now = self._decoder.decode(ids)
        final = len(now) if closed else self._decoder.final(ids, now)
        at = common(self._out, now)
        self.pending = now[max(at, final) :].rstrip(REPLACEMENT)
        if final == len(now):
            self._move(closed)
        else:
            self._out = now[:final] if final > at else self._out
            held = len(self._new)
            self._wait = held + held // 4 if held > 16 else 0  # a long wait costs no more than a short one, a token
        return now[at:final]

    def flush(self) -> str:
        """The rest, when nothing more comes."""
        now = self._decoder.decode([*self._before, *self._new])
        text = now[common(self._out, now) :]
        self._move(False)
        return text

    def _move(self, closed: bool) -> None:
        """All text is out: of the ids before it, keep few, behind which other ids mean what they do behind all.

        Decoders take spaces from the beginning of what they get, so the ids have to begin with something else, if there
        has been anything else.
        """
        decoder, new, self._new, self._wait, self.pending = self._decoder, self._new, [], 0, ""
        own, every = decoder.decode(new), [*self._before, *new]
        if own.strip(" ") and (closed or decoder.alike(new, every)):
            self._before, self._out = new, own
        elif not decoder.decode(self._before).strip(" ") or not decoder.alike(self._before, every):
            self._before = every if len(every) <= 64 else every[-32:]
            self._out = decoder.decode(self._before)
        else:
            self._out = decoder.decode(self._before)


class TextStream:
    """The text of tokens behind a prompt as it comes, up to the first of some stop strings.

    That is the one whose end comes first (of those that end together, the longest), wherever tokens begin and end. What
    may be the beginning of one is held.
    """

    def __init__(
        self, decoder: Decoder, prompt: Sequence[int] = (), stop: Sequence[str] = (), include: bool = False
    ) -> None:
        """include: whether the stop string is a part of the text."""
        self._text, self._stop, self._include, self._held = Detokenizer(decoder, prompt), stop, include, ""
        self.ended = False  # by a stop string

    def add(self, *tokens: int) -> str:
        """The text that may be shown now; nothing once it has ended."""
        if self.ended or not tokens:
            return ""
        text = self._held + self._text.add(*tokens)
        if (found := self._cut(text + self._text.pending)) is not None:
            return found
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The rest, when nothing more comes."""
        if self.ended:
            return ""
        text, self._held = self._held + self._text.flush(), ""
        found = self._cut(text)
        return text if found is None else found

    def _cut(self, text: str) -> str | None:
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if not found:
            return None
        self.ended, self._held = True, ""
        return text[: min(found)[0 if self._include else 1]]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
