"""A data folder's tokenizer is opened only if it is the one its shards were made with."""

import dataclasses
import json
import shutil

import pytest
import tokenizers
from flaky_server import FlakyServer
from mbit_data import inspection
from mbit_data.array import join, prepare_part
from mbit_data.options import Part
from mbit_data.prepare import PrepareOptions, prepare
from mbit_data.verify import verify
from tokenizers import AddedToken, models, pre_tokenizers

from megatron_bit.config import DataConfig, RemoteConfig
from megatron_bit.data.corpus import open_corpus
from megatron_bit.data.hf_tokenizer import TOKENIZER_CONFIG
from megatron_bit.data.manifest import load_manifest
from megatron_bit.errors import UserError

EOS = "<|endoftext|>"
NOT_NAMED = (
    r"tokenizer .*tokenizer.model is not the one the manifest names \(its SHA-256 is [0-9a-f]{64}, the manifest "
)


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared.folder, tmp_path / "copy")


def two_ends(folder):
    """A byte-level tokenizer.json with two tokens that may end a document, 256 and 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("</s>", EOS)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture
def hugging_face(corpus, tmp_path):
    """A folder whose documents end with token 257, which tokenizer_config.json alone says."""
    given = two_ends(tmp_path / "given")
    return prepare(PrepareOptions((str(corpus),), tmp_path / "hf", given, eos_token=EOS, workers=1), progress=False)


def refused(folder, message):
    """By everything that reads the folder's tokenizer, and by what starts to train on the folder."""
    for read in (
        lambda: load_manifest(folder, check_files=False).checked_tokenizer_path(),
        lambda: load_manifest(folder),
        lambda: inspection.inspect(folder),
        lambda: open_corpus(DataConfig(path=str(folder)), 1, check=False),  # as with data.on_error=skip
    ):
        with pytest.raises(UserError, match=message) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert len(verify(folder)) == 1


def test_the_right_one_is_found(prepared, hugging_face):
    for manifest in (prepared, hugging_face):
        assert load_manifest(manifest.folder).checked_tokenizer_path() == manifest.tokenizer_path
        assert verify(manifest.folder) == []


def test_another_one_of_the_same_size_is_not_opened(copy, prepared):
    data = bytearray(prepared.tokenizer_path.read_bytes())
    data[-1] ^= 1
    (copy / "tokenizer.model").write_bytes(data)
    refused(copy, NOT_NAMED + rf"says {prepared.tokenizer_sha256}\); copy it back or prepare the data again")


def test_a_missing_one(copy):
    (copy / "tokenizer.model").unlink()
    refused(copy, r"tokenizer.model cannot be read \(No such file or directory\); copy it back or prepare")


def test_the_file_that_names_the_end_of_a_document(hugging_face):
    config = hugging_face.folder / TOKENIZER_CONFIG
    config.write_text(json.dumps({"eos_token": "</s>"}))
    refused(hugging_face.folder, r"tokenizer_config.json is not the one .*token 256, the manifest says 257")
    for content in (json.dumps({"eos_token": "nowhere"}), "{", json.dumps({})):
        config.write_text(content)
        refused(hugging_face.folder, r"tokenizer_config.json")
    config.unlink()  # </s> and EOS may both end a document
    refused(hugging_face.folder, r"several tokens may end a document.*tokenizer_config.json")


def test_it_is_the_same_for_the_parts_of_an_array(corpus, tmp_path):
    given, out = two_ends(tmp_path / "given"), tmp_path / "out"
    options = PrepareOptions((str(corpus),), out, given, eos_token=EOS, workers=1, part=Part(0, 1))
    prepare_part(options, progress=False)
    (out / TOKENIZER_CONFIG).write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(UserError, match=r"tokenizer_config.json is not the one the parts .*token 256, with 257"):
        join(out, progress=False)


def test_behind_a_url_the_old_one_does_not_stay(hugging_face, tmp_path):
    """Without tokenizer_config.json there is no end of a document, even if an earlier start has fetched one."""
    server = FlakyServer(hugging_face.folder, lambda file, request: "")
    try:
        remote = RemoteConfig(cache=str(tmp_path / "cache"), attempts=1)
        assert load_manifest(server.url, options=remote).checked_tokenizer_path().read_bytes()
        (hugging_face.folder / TOKENIZER_CONFIG).unlink()
        with pytest.raises(UserError, match="several tokens may end a document"):
            load_manifest(server.url, options=remote).checked_tokenizer_path()
    finally:
        server.close()


def test_records_have_none(make_data):
    manifest = dataclasses.replace(make_data([10]), raw_bits=8, dtype="uint8", tokenizer_file="")
    with pytest.raises(UserError, match="holds records of 8 bits"):
        manifest.checked_tokenizer_path()
