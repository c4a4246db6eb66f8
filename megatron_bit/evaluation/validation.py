"""The validation split of a data folder, in a model's own tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bit.data.manifest import load_manifest
from megatron_bit.data.stream import read_shard
from megatron_bit.errors import UserError
from megatron_bit.evaluation.models import Model
from megatron_bit.inference.hf.text_bitlm import Detokenizer


class Validation:
    """Tokens of the split, as they are where the model has the folder's tokenizer, else of the text once more.

    Tokenized again, a model whose tokenizer is the same in another form (a converted folder) gets the same tokens.
    """

    def __init__(self, model: Model, folder: Path | str) -> None:
        """UserError: the folder is none of `megatron-bit prepare`, is damaged, or has no validation split."""
        self._model, self.manifest = model, load_manifest(folder)
        if self.manifest.raw_bits != model.record_bits:
            here, there = (f"records of {n} bits" if n else "text" for n in (model.record_bits, self.manifest.raw_bits))
            raise UserError(f"{model.path} is a model of {here}, and {folder} holds {there}; give --data DIR of {here}")
        self._split = self.manifest.split("validation")
        self._same = bool(model.record_bits) or model.tokenizer_sha256 == self.manifest.tokenizer_sha256
        self.bytes = 0  # UTF-8 bytes of the text of what `samples` has given
        self._tokens = 0
        self._sizes: list[int] = []  # bytes of the documents of the shard that was tokenized again last
        if not self._same:
            from megatron_bit.data.tokenizer import Tokenizer

            self._tokenizer = Tokenizer(self.manifest.checked_tokenizer_path())

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the text of the samples over their tokens, ends of documents among these; after `samples`."""
        return self.bytes / self._tokens

    def samples(self, count: int, length: int) -> list[list[Any]]:
        """The first pieces of `length` tokens, as training's validation takes them: shard by shard, in order.

        A record is a list of its bytes.

        Raises:
            UserError: the split has not two of them.
        """
        out: list[list[int]] = []
        self.bytes = 0
        for tokens in self._shards():
            rows = _cut(tokens, length)[: count - len(out)]
            out += rows.tolist()
            if not self._model.record_bits:
                self.bytes += self._text_bytes(tokens, len(rows) * length)
            if len(out) == count:
                break
        if len(out) < 2:
            raise UserError(
                f"the validation split of {self.manifest.folder} has {len(out)} pieces of {length} tokens, and two are "
                "the least; prepare more text"
            )
        self._tokens = len(out) * length
        return out

    def spread(self, count: int, length: int) -> list[list[int]]:
        """`count` pieces of `length` tokens from all over the first shards that have as many.

        Raises:
            UserError: the split has fewer.
        """
        return _spread((row for tokens in self._shards() for row in _cut(tokens, length)), count, length, self)

    def spread_in_documents(self, count: int, length: int) -> list[list[int]]:
        """The same, of pieces that lie in one document each, the first of which begins with it."""

        def pieces() -> Iterator[np.ndarray]:
            for tokens in self._shards():
                for document in np.split(tokens, np.flatnonzero(tokens == self._model.eos_id) + 1):
                    yield from _cut(document[document != self._model.eos_id], length)

        return _spread(pieces(), count, length, self)

    def _shards(self) -> Iterator[np.ndarray]:
        """int64 [tokens] of each shard; documents end with the model's end-of-document token."""
        for shard in self._split.shards:
            tokens = read_shard(self.manifest, shard)
            yield tokens.astype(np.int64) if self._same else self._again(tokens)

    def _text_bytes(self, tokens: np.ndarray, count: int) -> int:
        """UTF-8 bytes of the text of a shard's first tokens; the end of a document has none.

        Of a document that goes on behind them, as far as its text is certain: a character counts with the token that
        completes it.
        """
        total = begin = 0
        for number, document in enumerate(np.split(tokens, np.flatnonzero(tokens == self._model.eos_id) + 1)):
            if begin >= count:
                break
            ids = document[document != self._model.eos_id].tolist()
            total += self._document_bytes(number, ids, count - begin)
            begin += len(document)
        return total

    def _document_bytes(self, number: int, ids: list[int], count: int) -> int:
        whole = len(self._model.decode(ids).encode()) if self._same or count < len(ids) else 0
        size = whole if self._same else self._sizes[number]
        if count >= len(ids):
            return size
        part = len(Detokenizer(self._model.decoder).add(*ids[:count]).encode())
        if whole == size:
            return part
        # the model's tokens do not give all of the text back: what they stand for is a share of it
        return size * part // whole if whole else size * count // len(ids)

    def _again(self, tokens: np.ndarray) -> np.ndarray:
        ids: list[int] = []
        self._sizes = []
        for document in np.split(tokens, np.flatnonzero(tokens == self.manifest.eos_id) + 1):
            if len(document):
                text = self._tokenizer.decode(document)
                ids += [*self._model.encode(text), self._model.eos_id]
                self._sizes.append(len(text.encode()))
        return np.array(ids, dtype=np.int64)


def _cut(tokens: np.ndarray, length: int) -> np.ndarray:
    return tokens[: len(tokens) // length * length].reshape(-1, length, *tokens.shape[1:])


def _spread(pieces: Iterator[np.ndarray], count: int, length: int, of: Validation) -> list[list[int]]:
    """Evenly spaced ones of the first 64 times as many: neighbours are of one document, and say the same words."""
    found = [piece for piece, _ in zip(pieces, range(64 * count), strict=False)]
    if len(found) < count:
        raise UserError(
            f"the validation split of {of.manifest.folder} has {len(found)} pieces of {length} tokens, and --texts is "
            f"{count}; ask for fewer or shorter ones, or prepare more text"
        )
    return [found[i * len(found) // count].tolist() for i in range(count)]
