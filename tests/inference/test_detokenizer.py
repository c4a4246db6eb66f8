"""Text piece by piece against the tokenizer's own decoding of the whole, over random ids of many tokenizers."""

from __future__ import annotations

import email
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_bit.data.tokenizer import Tokenizer
from megatron_bit.inference.hf.text_bitlm import Decoder, Detokenizer, TextStream
from megatron_bit.inference.text import DataText, FolderText, Text
from megatron_bit.inference.tokenizer_json import convert_tokenizer

SOURCES = sorted(Path(email.__file__).parent.glob("*.py"))
LINES = [line for source in SOURCES for line in source.read_text().splitlines()]
LETTERS = "na\u00efve caf\u00e9 \u4e2d\u6587\u3002\u65e5\u672c \U0001f600\U0001f468\u200d\U0001f469 \u0440\u0443 \u05d0"
PLAIN = {
    "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
}  # fmt: skip
SENTENCEPIECE = {
    "bpe": {"model_type": "bpe", "add_dummy_prefix": False, **PLAIN},
    "bpe, dummy prefix": {"model_type": "bpe", **PLAIN},
    "unigram": {"model_type": "unigram", "add_dummy_prefix": False, **PLAIN},
    "unigram, dummy prefix": {"model_type": "unigram", **PLAIN},
    "SentencePiece's defaults": {"model_type": "unigram"},  # no bytes, NFKC, spaces at the beginning taken away
    "bpe, symbols": {"model_type": "bpe", **PLAIN, "user_defined_symbols": ["<tag>"], "add_dummy_prefix": False},
}
FAST = ("byte-level", "byte-level, few letters", "metaspace", "metaspace, bytes", "word pieces", "end of word")
CONVERTED = tuple(f"{name}, converted" for name in ("bpe", "bpe, dummy prefix"))
NAMES = (*SENTENCEPIECE, *FAST, *CONVERTED)


@cache
def make(name: str, folder: str) -> Text:
    path = Path(folder) / name.replace(" ", "_").replace(",", "").replace("'", "")
    path.mkdir(exist_ok=True)
    if name in SENTENCEPIECE:
        model = io.BytesIO()
        lines = iter([*LINES[:1500], LETTERS])
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, vocab_size=600, minloglevel=2, hard_vocab_limit=False,
            **SENTENCEPIECE[name],
        )  # fmt: skip
        (path / "tokenizer.model").write_bytes(model.getvalue())
        return DataText(path / "tokenizer.model")
    if name in CONVERTED:
        source = make(name.removesuffix(", converted"), folder)
        assert isinstance(source, DataText)
        fast = convert_tokenizer(source.tokenizer)
        return FolderText(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>"))
    made = _fast(name)
    made.add_special_tokens(["</s>"])
    if name.startswith("byte-level"):
        made.save(str(path / "tokenizer.json"))
        return DataText(path / "tokenizer.json")
    # what transformers does to some tokenizers' texts unless it is told not to
    return FolderText(
        PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", clean_up_tokenization_spaces=True)
    )


def _fast(name: str) -> tokenizers.Tokenizer:
    if name.startswith("byte-level"):
        made = tokenizers.ByteLevelBPETokenizer()
        if name == "byte-level":
            made.train_from_iterator([*LINES[:1500], LETTERS * 3], vocab_size=700, special_tokens=["</s>"])
            return made._tokenizer  # type: ignore[return-value]
        it = tokenizers.Tokenizer(models.BPE())  # the bytes of these letters and no others: none that nothing has
        it.pre_tokenizer, it.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        it.train_from_iterator([LETTERS], trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"]))
        return it
    if name == "word pieces":
        it = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        it.pre_tokenizer, it.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=True)
        it.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]"]))
        return it
    if name == "end of word":
        it = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
        it.pre_tokenizer, it.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["[UNK]"], end_of_word_suffix="</w>")
        it.train_from_iterator(LINES, trainer)
        return it
    fallback = name == "metaspace, bytes"
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))] if fallback else ["<unk>"]
    it = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=fallback))
    it.pre_tokenizer, it.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    it.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=500 + 256 * fallback, special_tokens=special))
    if not fallback:
        return it
    # bytes are tokens of the vocabulary, and not special: as in Llama's tokenizer.json
    model = models.BPE.from_file(*_files(it), unk_token="<unk>", byte_fallback=True)
    out = tokenizers.Tokenizer(model)
    out.pre_tokenizer = pre_tokenizers.Metaspace()
    replace = decoders.Replace("\u2581", " ")
    out.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    out.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return out


def _files(it: tokenizers.Tokenizer) -> list[str]:
    import tempfile

    return it.model.save(tempfile.mkdtemp())


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("tokenizers"))


@cache
def interesting(name: str, folder: str) -> list[int]:
    """Ids of bytes, of spaces and without text: what random ids of a vocabulary seldom put side by side."""
    text = make(name, folder)
    whole = [i for i in range(vocabulary(text)) if "\ufffd" in text.decode([i]) or not text.decode([i]).strip(" ")]
    bytes_ = [text.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in (*range(0x30, 0x35), *range(0x80, 0x100, 5))]
    return [*whole, *(i for i in bytes_ if i is not None)] or [0]


def vocabulary(text: Text) -> int:
    assert isinstance(text, DataText | FolderText)
    return text.tokenizer.vocab_size if isinstance(text, DataText) else len(text.tokenizer)


def pieces(text: Text, prompt: Sequence[int], new: Sequence[int]) -> list[str]:
    it = Detokenizer(text.decoder, prompt)
    return [*(it.add(token) for token in new), it.flush()]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_pieces_are_what_the_whole_text_has_behind_the_prompt(name: str, folder: str, data: st.DataObject) -> None:
    text = make(name, folder)
    some = st.lists(
        st.one_of(st.integers(0, vocabulary(text) - 1), st.sampled_from(interesting(name, folder))), max_size=40
    )
    prompt, new = data.draw(some), data.draw(some)
    found = "".join(pieces(text, prompt, new))
    before, both = text.decode(prompt), text.decode(prompt + new)
    if both.startswith(before):
        assert found == both[len(before) :]
    else:  # the prompt ends inside something that the new tokens change: all from there on
        shared = next(i for i in range(len(before) + 1) if not both.startswith(before[: i + 1]))
        assert found == both[shared:]
    assert text.behind(prompt, new) == found


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_stop_string_is_found_wherever_tokens_begin(name: str, folder: str, data: st.DataObject) -> None:
    """Against the text letter by letter; the stop strings are cut from it or made of its letters."""
    text = make(name, folder)
    ids = st.lists(st.integers(0, vocabulary(text) - 1), min_size=1, max_size=25)
    prompt, new = data.draw(ids), data.draw(ids)
    whole = text.behind(prompt, new)
    if not whole.strip("\ufffd"):
        return
    letter = st.sampled_from(sorted(set(whole)))
    at = data.draw(st.integers(0, len(whole) - 1))
    stop = [
        whole[at : at + data.draw(st.integers(1, 6))],
        *data.draw(st.lists(st.text(letter, min_size=1), max_size=2)),
    ]
    ends = (n for n in range(len(whole) + 1) if any(whole[:n].endswith(s) for s in stop))
    end = next(ends)  # letter by letter: the first of them that is complete
    begin = end - max(len(s) for s in stop if whole[:end].endswith(s))
    for include, expected in ((True, whole[:end]), (False, whole[:begin])):
        stream = TextStream(text.decoder, prompt, stop, include)
        shown = [stream.add(token) for token in new]
        assert "".join([*shown, stream.flush()]) == expected and stream.ended
    assert text.behind(prompt, new, stop) == whole[:end]


@pytest.mark.parametrize("name", NAMES)
def test_texts_in_pieces_of_whole_characters(name: str, folder: str) -> None:
    """A piece never ends inside a character, and text comes with the token that completes it."""
    text = make(name, folder)
    ids = text.encode(f"def f(x):  return x {LETTERS * 3} and so on")
    cut = len(ids) // 3
    shown = pieces(text, ids[:cut], ids[cut:])
    if "unk" not in text.decode(ids) and "\u2047" not in text.decode(ids):
        assert not any("\ufffd" in piece for piece in shown)
    assert text.decode(ids).endswith("".join(shown)) and sum(map(bool, shown)) > 3


@pytest.mark.parametrize("name", NAMES)
def test_a_token_costs_the_same_however_long_the_text_is(name: str, folder: str) -> None:
    """Ids that are decoded, counted; text, and what keeps the beginning of a text open or a character incomplete."""
    text, done = make(name, folder), []
    counted = Decoder(lambda ids: done.append(len(ids)) or text.decode(ids), text.convert_tokens_to_ids)
    eos = 2 if name in CONVERTED else getattr(text, "eos_id", None) or vocabulary(text) - 1
    real = text.encode("\n".join(LINES[:400]))
    kinds = [real, text.encode(" " * 800), [eos] * 800, text.encode(LETTERS * 100)]
    kinds += [[i] * 800 for i in interesting(name, folder)[:: max(1, len(interesting(name, folder)) // 8)]]
    for ids in kinds:
        for prompt in ([], real[:5000]):
            it = Detokenizer(counted, prompt)
            done.clear()
            for token in ids[:800]:
                it.add(token)
            it.flush()
            assert sum(done) < 600 * len(ids) + 800, (text.decode(ids[:5]), sum(done) / len(ids))


def test_by_hand(folder: str) -> None:
    """What the spaces, bytes and ends of three tokenizers are, without a rule to compute it from."""
    llama = make("bpe, dummy prefix", folder)
    a, of = llama.encode("import"), [llama.convert_tokens_to_ids("\u2581of")]
    assert llama.decode(of) == "of" and llama.decode([*a, *of]) == "import of" and llama.behind(a, of) == " of"
    assert pieces(llama, a, of) == [" of", ""] and pieces(llama, [], of) == ["of", ""]
    chinese = [llama.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "\u7121\u7121".encode()]
    assert pieces(llama, a, chinese) == ["", "", "\u7121", "", "", "\u7121", ""]
    assert pieces(llama, a, chinese[:2]) == ["", "", "\ufffd\ufffd"]
    assert pieces(llama, [*a, *chinese[:2]], chinese[2:3]) == ["\u7121", ""], "the prompt ends inside a character"
    assert llama.behind([*a, *chinese[:2]], of) == " of", "which stays what it is"
    assert pieces(llama, a, [*of, llama.eos_id]) == [" of", "", ""]  # type: ignore[attr-defined]


def test_the_data_folders_tokenizer_has_names(folder: str) -> None:
    for name in ("bpe", "byte-level"):
        text = make(name, folder)
        assert isinstance(text, DataText) and isinstance(text.tokenizer, Tokenizer)
        assert text.tokenizer.id_of("</s>") == text.eos_id and text.tokenizer.id_of("no such token") is None
