"""JSON that is not one value a line: an array's elements, or values one after another, one at a time in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

MAX_VALUE = 1 << 26  # characters of one value
LEAST = 1 << 20  # characters asked for at a time
_SPACE = re.compile(r"[ \t\r\n]*")


class BrokenFile(Exception):
    """(where, what): behind that place there is no telling where records begin."""


class JsonValues:
    """Values out of pieces of a file. Raises BrokenFile for what is no JSON, no UTF-8, or too long."""

    def __init__(self, pieces: Iterator[bytes], line: int) -> None:
        """`line`: number of the first one, from 1."""
        self._pieces, self._line = pieces, line
        self._decoder = json.JSONDecoder()
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._counted, self._ended = "", 0, 0, False

    def objects(self) -> Iterator[tuple[Any, int]]:
        """(value, line it begins in) until the end."""
        while self._next_character():
            yield self._value()

    def elements(self) -> Iterator[tuple[Any, int]]:
        """The same of the elements of the one array that the file is."""
        self._expect("[")
        if self._next_character() != "]":
            yield self._value()
            while self._next_character() == ",":
                self._at += 1
                self._next_character()
                yield self._value()
        self._expect("]")
        if self._next_character():
            self._broken("there is more behind the array")

    def _expect(self, character: str) -> None:
        if self._next_character() != character:
            found = self._next_character()
            self._broken(f"{found!r} where {character!r} should be" if found else f"it ends without {character!r}")
        self._at += 1

    def _next_character(self) -> str:
        """Past white space; "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _value(self) -> tuple[Any, int]:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > MAX_VALUE:
                    self._broken(f"more than {MAX_VALUE >> 20} MiB in one record")
                if not self._more():  # it is not because the text ends here
                    self._broken(f"not JSON ({error.msg}; record from here to line {error.lineno + self._place() - 1})")
            except (ValueError, RecursionError) as error:
                self._broken(f"not JSON ({error})")
            else:
                if end < len(self._text) or isinstance(value, dict | list | str) or not self._more():
                    place, self._at = self._place(), end
                    return value, place

    def _more(self) -> bool:
        """As much as there is already, so that a long value is not parsed over and over; False at the end."""
        self._place()
        self._text, self._at, self._counted = self._text[self._at :], 0, 0
        parts, found = [self._text], 0
        while found < max(LEAST, len(self._text)) and not self._ended:
            piece = next(self._pieces, b"")
            self._ended = not piece
            try:
                parts.append(self._utf8.decode(piece, self._ended))
            except UnicodeDecodeError as error:
                self._broken(f"not UTF-8 (byte 0x{error.object[error.start]:02X} behind this line)")
            found += len(parts[-1])
        self._text = "".join(parts)
        return found > 0

    def _place(self) -> int:
        """The line that the reading has come to."""
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def _broken(self, what: str) -> NoReturn:
        raise BrokenFile(f"line {self._place()}", what)
