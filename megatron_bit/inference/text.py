"""What a generator's tokens are to a person: text by one of several tokenizers, or raw records.

How ids become text, piece by piece and behind a prompt, is in `hf/text_bitlm.py` (`Decoder`, `Detokenizer`,
`TextStream`), because a converted folder needs it too; generate, serve, stop strings and evaluate all use that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from megatron_bit.data.tokenizer import Tokenizer
from megatron_bit.errors import UserError
from megatron_bit.inference.hf.text_bitlm import Decoder, TextStream
from megatron_bit.inference.tokenizer_json import check_folder


class Text:
    """What the ids of a model mean: text to ids without any that begin or end it, and back without special tokens."""

    def encode(self, text: str) -> list[Any]:
        """Token ids; of records their bytes."""
        raise NotImplementedError

    def decode(self, ids: Sequence[Any], **_: Any) -> str:
        """The text of ids that are a whole text; of those that continue one it is `behind`."""
        raise NotImplementedError

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of a token by its name, under transformers' name for that; None if there is no such token."""
        raise NotImplementedError

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder.of(self)

    def behind(self, prompt: Sequence[Any], new: Sequence[Any], stop: Sequence[str] = ()) -> str:
        """The text of `new` behind `prompt`, up to the end of the first stop string in it."""
        if not stop:
            return self.decoder.behind(prompt, new)
        stream = TextStream(self.decoder, prompt, stop, include=True)
        return "".join([*(stream.add(token) for token in new), stream.flush()])


class DataText(Text):
    """The tokenizer of a data folder."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = Tokenizer(path)
        self.eos_id = self.tokenizer.eos_id

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return self.tokenizer.decode(ids)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.tokenizer.id_of(token)


class FolderText(Text):
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def converted(cls, folder: Path) -> FolderText:
        """Of a folder that `convert` made. UserError if it is another tokenizer by now."""
        check_folder(folder)
        return cls(PreTrainedTokenizerFast.from_pretrained(folder))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.tokenizer.convert_tokens_to_ids(token)


class Records(Text):
    """Raw records as text: a line of hexadecimal digits each."""

    def __init__(self, bits: int) -> None:
        self.bytes = -(-bits // 8)

    def encode(self, text: str) -> list[list[int]]:
        try:
            return self.split(bytes.fromhex(text))
        except ValueError as error:
            raise UserError(f"--prompt {text[:40]!r}: {error}; give records as hexadecimal digits") from None

    def split(self, content: bytes) -> list[list[int]]:
        """Records of a file; ValueError if the last one is not whole."""
        if len(content) % self.bytes:
            raise ValueError(f"{len(content)} bytes are no whole number of records of {self.bytes}")
        return [[*content[at : at + self.bytes]] for at in range(0, len(content), self.bytes)]

    def decode(self, ids: Sequence[Sequence[int]], **_: Any) -> str:
        return "\n".join(bytes(record).hex() for record in ids)

    def behind(self, prompt: Sequence[Any], new: Sequence[Any], stop: Sequence[str] = ()) -> str:
        """Records are what they are, wherever they stand, and have no stop strings."""
        return self.decode(new)
