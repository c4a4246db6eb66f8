"""Text comes back from its tokens exactly."""

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from mbit_data.inputs import expand_inputs
from mbit_data.train_tokenizer import SENTENCE_CHARS, _sentences, train_tokenizer

from megatron_bit.data.tokenizer import Tokenizer
from megatron_bit.errors import UserError

SOURCES = [file.path.read_bytes().decode() for file in expand_inputs(["stdlib"])[::40]]


def model_file(folder: Path, model_type) -> Path:
    path = folder / f"{model_type}.model"
    path.write_bytes(train_tokenizer(SOURCES[:6], 600, model_type))
    return path


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return Tokenizer(model_file(tmp_path_factory.mktemp("model"), request.param))


def test_python_sources_come_back_exactly(tokenizer):
    assert sum(map(len, SOURCES)) > 100_000  # how much every fortieth file is differs from Python to Python
    for text in SOURCES:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.exact


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(1 < token < tokenizer.vocab_size for token in ids)  # neither eos nor unk


def test_special_characters_come_back_exactly(tokenizer):
    for text in [
        "▁",
        "a▁ b▁▁",
        "▅ ⁇ </s> <unk> <0x41>",
        "\0",
        "\r\n\t x  \n\n ",
        "\ufeffa",
        "e\u0301é ﬁ",
        "",
    ]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_vocabulary(tokenizer):
    assert tokenizer.vocab_size == 600
    assert tokenizer.eos_id == 0
    assert tokenizer.decode([0, *tokenizer.encode("a"), 0]) == "a"
    with pytest.raises(ValueError, match=r"token 600 .* vocabulary of 600"):
        tokenizer.decode([5, 600])
    with pytest.raises(ValueError, match="token -1"):
        tokenizer.decode([-1])


def test_indentation_and_line_ends_are_pieces(tokenizer):
    assert len(tokenizer.encode(" " * 8)) <= 2
    assert len(tokenizer.encode(":\n")) <= 2


def test_training_sentences_are_the_text_cut_before_line_ends():
    text = max(SOURCES, key=len)
    sentences = list(_sentences([text, "x" * (2 * SENTENCE_CHARS + 1)]))
    assert "".join(sentences[:-3]) == text and "".join(sentences[-3:]) == "x" * (2 * SENTENCE_CHARS + 1)
    assert max(map(len, sentences)) <= SENTENCE_CHARS
    assert len(sentences) > 5 and all(sentence[0] == "\n" for sentence in sentences[1:-3])


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic(tmp_path, model_type):
    first = model_file(tmp_path, model_type).read_bytes()
    assert model_file(tmp_path, model_type).read_bytes() == first


def test_what_cannot_be_trained_is_a_user_error():
    with pytest.raises(UserError, match=r"vocab_size is 4096.*only \d+ pieces.*set vocab_size to"):
        train_tokenizer(["hello world\n"], 4096, "bpe")
    with pytest.raises(UserError, match="characters need"):
        train_tokenizer(["".join(map(chr, range(0x4E00, 0x5300)))], 400, "bpe")
    with pytest.raises(UserError, match="empty"):
        train_tokenizer([], 400, "bpe")


def test_files_that_are_no_tokenizer_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece"):
        Tokenizer(tmp_path / "bad.model")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCES[0].splitlines()),
        model_writer=model,
        vocab_size=300,
        eos_id=-1,
        model_type="bpe",
        minloglevel=2,
    )
    (tmp_path / "no_eos.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match="end-of-sentence"):
        Tokenizer(tmp_path / "no_eos.model")
