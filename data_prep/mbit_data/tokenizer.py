"""The SentencePiece tokenizer: text to token ids and back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from megatron_bit.errors import UserError

SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character, so the character itself needs care
PROBE = "def f(x):\n\treturn  'a'  \r\n\n    # \u00e9\u0301 \U0001f600 \u2581 \ufb01 </s> <unk>\n"


class Tokenizer:
    """A SentencePiece model file. A tokenizer trained here gives every text back exactly (`exact`)."""

    def __init__(self, path: Path | str):
        """Raises UserError: the file is missing, is no SentencePiece model, or has no end-of-sentence id."""
        self.path = path = Path(path)
        try:
            model = path.read_bytes()
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except OSError as error:
            raise UserError(
                f"tokenizer {path} cannot be read ({error.strerror}); give a SentencePiece .model file"
            ) from error
        except RuntimeError as error:
            raise UserError(f"tokenizer {path} is not a SentencePiece .model file") from error
        self.sha256 = hashlib.sha256(model).hexdigest()  # of the file
        self.vocab_size: int = self._model.vocab_size()
        self.eos_id: int = self._model.eos_id()
        if self.eos_id < 0:
            raise UserError(f"tokenizer {path} has no end-of-sentence piece (eos_id); documents need one")
        marks = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._space_mark = marks if all(self._model.is_byte(mark) for mark in marks) else None

    def encode(self, text: str) -> list[int]:
        """Token ids, without an end-of-document id."""
        if self._space_mark is None or SPACE_MARK not in text:
            return self._model.encode(text)
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE_MARK)):
            ids += self._space_mark if i else []
            ids += self._model.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; control tokens such as the end of a document give nothing.

        Raises ValueError for an id outside 0 .. vocab_size-1.
        """
        ids = [int(token) for token in ids]
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token} is outside the tokenizer's vocabulary of {self.vocab_size}")
        return self._model.decode(ids)

    @property
    def exact(self) -> bool:
        """Whether a text with tabs, runs of spaces, line ends and rare characters comes back unchanged."""
        return self.decode(self.encode(PROBE)) == PROBE
