"""Train a SentencePiece tokenizer on a bounded sample; same sample, same bytes."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from typing import Literal

import sentencepiece

from mbit_data.decompress import check_unchanged
from mbit_data.input_file import InputFile
from mbit_data.read import Reading, read_documents
from megatron_bit.errors import UserError

ModelType = Literal["unigram", "bpe"]
MODEL_TYPES = ("unigram", "bpe")
MIN_VOCAB_SIZE = 260  # 256 bytes, eos, unk and some characters
MAX_VOCAB_SIZE = 262_144
SENTENCE_CHARS = 4096
SMALL_FILE_BYTES = 256 * 1024
# Stored in the model, and decides the summation order of unigram's statistics: fixed, not the machine's.
NUM_THREADS = 4


def sample_texts(files: list[InputFile], budget: int, reading: Reading | None = None) -> Iterator[str]:
    """Texts of about `budget` UTF-8 bytes in all, the same ones every time.

    Goes through the files in the order of the hash of their names until the budget is used up. From each it
    takes the beginning: at most 256 KiB, or, of a larger file, its share of the budget by size on disk.
    """
    left, total = budget, sum(file.size for file in files) or 1
    for file in sorted(files, key=_name_hash):
        share = min(left, max(SMALL_FILE_BYTES, -(-budget * file.size // total)))
        for document in read_documents(file, reading):
            if share <= 0:
                check_unchanged(file)  # its hash will never be known
                break
            text = document.text[:share]  # characters, at most as many as bytes: never above the budget by 4x
            used = len(text.encode())
            share, left = share - used, left - used
            yield text
        if left <= 0:
            return


def _name_hash(file: InputFile) -> bytes:
    return hashlib.sha256(os.fsencode(file.source)).digest()


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_type: ModelType) -> bytes:
    """The bytes of a .model file: eos 0, unk 1, 256 byte pieces, then learned ones.

    Nothing is normalised, and no space is added or removed, so that every text comes back exactly.
    Raises UserError if the texts do not support that many pieces.
    """
    model = io.BytesIO()
    failed: list[BaseException] = []  # the library makes a RuntimeError of whatever the texts raise
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(_watched(texts, failed)),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            eos_id=0,
            unk_id=1,
            bos_id=-1,
            pad_id=-1,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation
            split_digits=True,
            max_sentence_length=4 * SENTENCE_CHARS + 16,  # bytes: no sentence made here is left out
            num_threads=NUM_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failed:
            raise failed[0] from None
        raise UserError(_explain(str(error), vocab_size)) from error
    return model.getvalue()


def _watched(texts: Iterable[str], failed: list[BaseException]) -> Iterator[str]:
    try:
        yield from texts
    except Exception as error:
        failed.append(error)
        raise


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of text of at most SENTENCE_CHARS, cut at line ends where there is one, each with the line end
    in front of it: the trainer strips them from the end, but is to learn them."""
    for text in texts:
        start = 0
        while start < len(text):
            end = start + SENTENCE_CHARS
            if end < len(text):
                line_end = text.rfind("\n", start + 1, end)
                end = line_end if line_end > start else end
            yield text[start:end]
            start = end


def _explain(error: str, vocab_size: int) -> str:
    if "sentences_.empty()" in error:
        return "the input is empty: there is no text to train a tokenizer on; give other inputs"
    limit = re.search(r"value <= (\d+)", error)
    if limit:
        return (
            f"vocab_size is {vocab_size}, but the input supports only {limit[1]} pieces; "
            f"set vocab_size to {limit[1]} or less, or give more text"
        )
    required = re.search(r"required_chars[^\d]*\d+ vs (\d+)", error)
    if required:
        return f"vocab_size is {vocab_size}, but its characters need {required[1]}; raise it"
    return f"no tokenizer of vocab_size {vocab_size} can be trained on this input: {error.strip()}"
