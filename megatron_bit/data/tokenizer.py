"""Text to token ids and back: a SentencePiece `.model` or a Hugging Face `tokenizer.json`, told apart by content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

from megatron_bit.errors import UserError

SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character, so the character itself needs care
PROBE = "def f(x):\n\treturn  'a'  \r\n\n    # \u00e9\u0301 \U0001f600 \u2581 \ufb01 </s> <unk>\n"
FILE_NAMES = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json"}


class _Model(Protocol):
    vocab_size: int
    eos_id: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def id_of(self, token: str) -> int | None: ...


class Tokenizer:
    """A tokenizer file. One trained here gives every text back exactly (`exact`)."""

    def __init__(self, path: Path | str, eos_token: str | None = None):
        """`eos_token`: the token that ends a document, where a tokenizer.json does not say it (see `hf_tokenizer`).

        Raises UserError: the file is missing, is neither kind of tokenizer, or has no end-of-document token.
        """
        self.path = path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"tokenizer {path} cannot be read ({error.strerror}); give a SentencePiece .model file "
                "or a Hugging Face tokenizer.json"
            ) from error
        self.sha256 = hashlib.sha256(data).hexdigest()  # of the file
        self.kind: Literal["sentencepiece", "huggingface"]
        if data.lstrip()[:1] == b"{":
            from megatron_bit.data.hf_tokenizer import HuggingFaceModel

            self.kind = "huggingface"
            self.model: _Model = HuggingFaceModel(path, data, eos_token)
        else:
            if eos_token is not None:
                raise UserError(f"eos_token is {eos_token!r}; it is for a tokenizer.json, and {path} has its own")
            self.kind = "sentencepiece"
            self.model = _SentencePieceModel(path, data)
        self.vocab_size = self.model.vocab_size  # the largest id plus one
        self.eos_id = self.model.eos_id

    def encode(self, text: str) -> list[int]:
        """Token ids, without an end-of-document id."""
        return self.model.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; control tokens such as the end of a document give nothing.

        Raises ValueError for an id outside 0 .. vocab_size-1.
        """
        ids = [int(token) for token in ids]
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token} is outside the tokenizer's vocabulary of {self.vocab_size}")
        return self.model.decode(ids)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name, as "<0x0A>"; None if the vocabulary has no such token."""
        return self.model.id_of(token)

    @property
    def exact(self) -> bool:
        """Whether a text with tabs, runs of spaces, line ends and rare characters comes back unchanged."""
        return self.decode(self.encode(PROBE)) == PROBE


class _SentencePieceModel:
    def __init__(self, path: Path, data: bytes):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise UserError(
                f"tokenizer {path} is not a SentencePiece .model file (nor a Hugging Face tokenizer.json)"
            ) from error
        self.vocab_size: int = self._model.vocab_size()
        self.eos_id: int = self._model.eos_id()
        if self.eos_id < 0:
            raise UserError(f"tokenizer {path} has no end-of-sentence piece (eos_id); documents need one")
        marks = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._space_mark = marks if all(self._model.is_byte(mark) for mark in marks) else None

    def encode(self, text: str) -> list[int]:
        if self._space_mark is None or SPACE_MARK not in text:
            return self._model.encode(text)
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE_MARK)):
            ids += self._space_mark if i else []
            ids += self._model.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def id_of(self, token: str) -> int | None:
        found = self._model.piece_to_id(token)  # that of the unknown piece, if there is none
        return found if self._model.id_to_piece(found) == token else None
