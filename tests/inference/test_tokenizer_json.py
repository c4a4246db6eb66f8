"""tokenizer.json encodes as the SentencePiece model does, and a model for which it could not is refused."""

from __future__ import annotations

import email
import io
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from mbit_data.train_tokenizer import train_tokenizer

from megatron_bit.data.tokenizer import PROBE, Tokenizer
from megatron_bit.errors import UserError
from megatron_bit.inference.tokenizer_json import _cuts, convert_tokenizer

SOURCES = sorted(Path(email.__file__).parent.glob("*.py"))
TEXTS = [
    "", " ", "   ", "\n", "\n\n\n\n\n", "\t", "\r\n", " leading", "trailing ", "  two  two  ", "a\n    b\n        c",
    "\0", "\x7f", "na\u00efve caf\u00e9 \u00e9 e\u0301", "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u4e2d\u6587\u3002\u65e5\u672c\u8a9e", "\u2581", "a\u2581b", " \u2581 \u2581\u2581", "</s>", "<unk>", "<0x0A>",
    "a</s>b<unk>c<0x41>", "\ufb01\u2460\u00bd", "\ufffd", "\u00a0", "-" * 71, "=" * 33, " " * 100,
    "#" * 9 + " x " + "#" * 10, "0123456789" * 5, PROBE, unicodedata.normalize("NFD", "\u00c5\u00f6\u1e9b"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.model"
    path.write_bytes(train_tokenizer((source.read_text() for source in SOURCES), 1500, "bpe"))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def converted_bpe(bpe: Tokenizer) -> Any:
    return convert_tokenizer(bpe)


def test_the_same_ids(bpe, converted_bpe):
    for text in [*TEXTS, *(source.read_text() for source in SOURCES)]:
        ids = converted_bpe.encode(text, add_special_tokens=False).ids
        assert ids == bpe.encode(text), text[:80]
        assert converted_bpe.decode(ids) == bpe.decode(ids) == text
    assert sum(len(source.read_text()) for source in SOURCES) > 200_000


@given(
    st.lists(
        st.sampled_from([" ", "  ", "a", "ab", "\n", "\n ", "=", "return", "x1", "\u00e9", "\u2581", ":", "\t"]),
        max_size=40,
    )
)
@settings(max_examples=200, deadline=None)
def test_the_same_ids_for_runs_and_mixtures(bpe, converted_bpe, parts):
    text = "".join(parts)
    assert converted_bpe.encode(text, add_special_tokens=False).ids == bpe.encode(text)


def test_unigram_up_to_ties(tmp_path):
    """Two orders of the same pieces have the same score, and rounding decides between them."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_tokenizer((source.read_text() for source in SOURCES), 1500, "unigram"))
    mine = Tokenizer(path)
    converted = convert_tokenizer(mine)
    same = 0
    lines = [line for source in SOURCES for line in source.read_text().splitlines(keepends=True)]
    for text in [*TEXTS, *lines]:
        ids, expected = converted.encode(text, add_special_tokens=False).ids, mine.encode(text)
        same += ids == expected
        assert sorted(ids) == sorted(expected), text
        assert converted.decode(ids) == text
    print(f"{same} of {len(lines) + len(TEXTS)} lines have the same ids in the same order")
    assert same > 0.98 * (len(lines) + len(TEXTS))


def foreign(path: Path, **options) -> Tokenizer:
    """A model with SentencePiece's defaults: NFKC, a space in front, runs of spaces joined, no byte pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for source in SOURCES for line in source.read_text().splitlines()),
        model_writer=model, minloglevel=2, **options,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


def test_a_foreign_model_that_normalises(tmp_path):
    mine = foreign(tmp_path / "foreign.model", model_type="bpe", vocab_size=600)
    converted = convert_tokenizer(mine)
    for text in [
        "",
        " a  b ",
        "x\u00a0y",
        "\ufb01ne",
        "\uff21\uff22",
        "caf\u00e9",
        "def f(x):  return x",
        "\u4e2d\u6587 ok",
    ]:
        assert converted.encode(text, add_special_tokens=False).ids == mine.encode(text), text


def test_symbols_of_the_user(tmp_path):
    mine = foreign(
        tmp_path / "symbols.model", model_type="bpe", vocab_size=600, user_defined_symbols=["<tag>"],
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity",
    )  # fmt: skip
    converted = convert_tokenizer(mine)
    for text in ["<tag>", "a <tag>b<tag>", "< tag>", "return<tag>\n"]:
        assert converted.encode(text, add_special_tokens=False).ids == mine.encode(text), text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_type": "char"}, "model type other than bpe and unigram"),
        ({"model_type": "bpe", "vocab_size": 600, "treat_whitespace_as_suffix": True}, "white space as suffix"),
        # the library reads \r\n as one character in NFKC, SentencePiece as two
        ({"model_type": "bpe", "vocab_size": 600, "remove_extra_whitespaces": False}, "in training and"),
        # SentencePiece puts its space in front of the symbol, the library looks for symbols first
        ({"model_type": "bpe", "vocab_size": 600, "user_defined_symbols": ["<tag>"]}, "in training and"),
    ],
)
def test_a_model_that_cannot_be_written_is_refused(options, words, tmp_path):
    with pytest.raises(UserError, match=words):
        convert_tokenizer(foreign(tmp_path / "other.model", **options))


def test_what_comes_out_differently_is_refused(bpe, monkeypatch):
    from megatron_bit.inference import tokenizer_json

    monkeypatch.setattr(tokenizer_json, "_cuts", lambda text, known: _cuts(text, known)[:-1])
    with pytest.raises(UserError, match="in training and"):
        convert_tokenizer(bpe)


def test_a_tokenizer_json_loses_what_it_would_add(tmp_path):
    """Trained with plain text: a template, a limit and special tokens in a text have no say."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train([str(source) for source in SOURCES], vocab_size=600, special_tokens=["<s>", "<|endoftext|>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.enable_truncation(5)
    made.save(str(tmp_path / "tokenizer.json"))
    mine = Tokenizer(tmp_path / "tokenizer.json")
    converted = convert_tokenizer(mine)
    for text in [*TEXTS, SOURCES[0].read_text(), "a<|endoftext|>b"]:
        assert converted.encode(text).ids == mine.encode(text), text
    assert len(mine.encode("one two three four five six")) > 5 and made.encode("x").ids[0] == 0


def test_cuts_of_a_piece_in_the_order_in_which_they_are_tried():
    known = {"ab", "aba", "ba", "a", "b", "aa", "aaa"}
    assert _cuts("ababa", known) == [2, 3]  # ab+aba in front of aba+ba: the text ab aba ba has both, the left one wins
    assert _cuts("aaaa", known) == [3, 2, 1]
