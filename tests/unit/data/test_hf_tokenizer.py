"""A Hugging Face tokenizer.json does all that a SentencePiece model does; vocabularies up to 262,144."""

import json

import numpy as np
import pytest
import tokenizers
from mbit_data.prepare import PrepareOptions, prepare
from mbit_data.verify import verify
from tokenizers import decoders, models, pre_tokenizers

from megatron_bit.data.hf_tokenizer import TOKENIZER_CONFIG
from megatron_bit.data.manifest import load_manifest
from megatron_bit.data.stream import read_documents, read_shard
from megatron_bit.data.tokenizer import Tokenizer
from megatron_bit.errors import UserError

EOS = "<|endoftext|>"


def byte_level(extra=(), special=(EOS,), filler=0):
    """A byte-level BPE like GPT-2's, with `filler` pieces that no text reaches in front of the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *(f"filler{i}" for i in range(filler))])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in extra])
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in special])
    return tokenizer


def save(tokenizer, folder, name="tokenizer.json", **config):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / name))
    if config:
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(config))
    return folder / name


def test_text_comes_back_and_special_tokens_in_it_are_text(tmp_path):
    tokenizer = Tokenizer(save(byte_level(), tmp_path))
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.exact) == ("huggingface", 257, 256, True)
    for text in ["", "a  b\r\n\t", f"x{EOS}y", "\U0001f600 \u2581", "\0"]:
        ids = tokenizer.encode(text)
        assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == text
    assert tokenizer.decode([256, *tokenizer.encode("a"), 256]) == "a"
    with pytest.raises(ValueError, match="token 257 is outside"):
        tokenizer.decode([257])


def test_an_end_token_that_is_not_special_cannot_end_a_text_either(tmp_path):
    tokenizer = Tokenizer(save(byte_level(extra=["<eos>"], special=[]), tmp_path))
    assert tokenizer.eos_id == 256 and 256 not in tokenizer.encode("a<eos>b")
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[SEP]": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match=r"reads '\[SEP\]' in a text as the end"):
        Tokenizer(save(words, tmp_path / "words"))


def test_settings_of_a_training_do_not_cut_documents(tmp_path):
    model = byte_level()
    model.enable_truncation(5)
    model.enable_padding(length=5)
    tokenizer = Tokenizer(save(model, tmp_path))
    assert len(tokenizer.encode("x" * 100)) == 100 and len(tokenizer.encode("x")) == 1


def test_which_token_ends_a_document(tmp_path):
    both = byte_level(special=["</s>", EOS, "<end>"])
    with pytest.raises(UserError, match=r"several tokens may end a document.*--eos-token"):
        Tokenizer(save(both, tmp_path / "a"))
    assert Tokenizer(tmp_path / "a" / "tokenizer.json", "<end>").eos_id == 258
    assert Tokenizer(save(both, tmp_path / "b", eos_token="</s>")).eos_id == 256
    assert Tokenizer(save(both, tmp_path / "c", eos_token={"content": EOS})).eos_id == 257
    with pytest.raises(UserError, match=r"no token .<x>. to end documents"):
        Tokenizer(tmp_path / "c" / "tokenizer.json", "<x>")
    with pytest.raises(UserError, match="no token is known to end a document"):
        Tokenizer(save(byte_level(special=[]), tmp_path / "d"))


def test_files_that_are_no_tokenizer(tmp_path, prepared):
    (tmp_path / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(UserError, match=r"not a Hugging Face tokenizer\.json"):
        Tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"eos_token is 'x'; it is for a tokenizer\.json"):
        Tokenizer(prepared.tokenizer_path, "x")


def test_a_folder_made_with_it(corpus, tmp_path):
    """The token that was named ends the documents, also for those who read the folder later."""
    given = save(byte_level(special=["</s>", EOS]), tmp_path / "given")
    options = PrepareOptions((str(corpus),), tmp_path / "out", given, eos_token=EOS, workers=1, shard_tokens=10_000)
    manifest = prepare(options, progress=False)
    assert manifest.tokenizer_path.name == "tokenizer.json"
    assert manifest.tokenizer_path.read_bytes() == given.read_bytes()
    assert (manifest.vocab_size, manifest.eos_id, manifest.dtype) == (258, 257, "uint16")
    tokenizer = Tokenizer(manifest.tokenizer_path)
    assert tokenizer.eos_id == 257 and not verify(manifest.folder)
    expected = {path.read_bytes().decode() for path in corpus.rglob("*.py")}
    found = set()
    for split in manifest.splits.values():
        for shard in split.shards:
            for ids in read_documents(manifest.shard_path(shard)):
                assert ids[-1] == 257 and 257 not in ids[:-1]
                found.add(tokenizer.decode(ids))
    assert found == expected
    with pytest.raises(UserError, match=r"holds other data: tokenizer .*'eos_id': 257.*'eos_id': 256"):
        prepare(PrepareOptions(**{**options.__dict__, "eos_token": "</s>"}), progress=False)
    (manifest.folder / TOKENIZER_CONFIG).write_text('{"eos_token": "</s>"}')
    assert ["256" in problem for problem in verify(manifest.folder)] == [True]


def test_a_vocabulary_of_262144(tmp_path):
    """Ids above 65,535 need uint32, and come back from the shards."""
    (tmp_path / "corpus").mkdir()
    names = [f"<t{i}>" for i in range(3)]
    text = "plain " + " ".join(names)
    (tmp_path / "corpus" / "a.txt").write_text(text)
    given = save(byte_level(extra=names, filler=262_144 - 256 - 4), tmp_path / "given")
    options = PrepareOptions((str(tmp_path / "corpus"),), tmp_path / "out", given, workers=1, validation_fraction=0)
    prepare(options, progress=False)
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.vocab_size, manifest.dtype, manifest.eos_id) == (262_144, "uint32", 262_143)
    (shard,) = manifest.split("train").shards
    tokens = read_shard(manifest, shard)
    assert tokens.dtype == np.uint32
    assert {262_140, 262_141, 262_142} < set(tokens.tolist()) and tokens[-1] == 262_143
    assert Tokenizer(manifest.tokenizer_path).decode(tokens) == text
