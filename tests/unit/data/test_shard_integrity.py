"""Shards are what the manifest says, bit by bit, and none of them takes more memory than it says."""

import dataclasses
import gzip
import io
import math
import tarfile
import tracemalloc

import numpy as np
import pytest
from flaky_server import FlakyServer
from hypothesis import given, settings
from hypothesis import strategies as st
from mbit_data import inspection

from megatron_bit.config import RemoteConfig, load_config
from megatron_bit.data.batches import BatchStream
from megatron_bit.data.corpus import open_corpus
from megatron_bit.data.manifest import FILE_NAME, Shard, Split, lengths_file, load_manifest
from megatron_bit.data.npy import decode_array
from megatron_bit.data.stream import ShardReader, read_shard, streamed_tokens
from megatron_bit.errors import ShardError, UserError
from megatron_bit.io.files import write_atomic

SHARDS = [333, 128, 256]


def shard_of(manifest, number=0):
    shard = manifest.split("train").shards[number]
    return shard, manifest.shard_path(shard)


def flip(path, at, bit=0):
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)


def a_token(path):
    """Where a byte of a token lies."""
    return path.read_bytes().index(b"\x93NUMPY") + 128


def test_any_flipped_bit_is_found_while_the_shard_is_read(make_data):
    manifest = make_data([300])
    shard, path = shard_of(manifest)
    good = path.read_bytes()
    right = read_shard(manifest, shard)

    @given(st.integers(0, len(good) - 1), st.integers(0, 7))
    @settings(max_examples=150, deadline=None)
    def check(at, bit):
        path.write_bytes(good)
        flip(path, at, bit)
        with pytest.raises(ShardError, match=rf"SHA-256 is (?!{shard.sha256})[0-9a-f]{{64}}, .*says {shard.sha256}"):
            read_shard(manifest, shard)

    check()
    path.write_bytes(good)
    np.testing.assert_array_equal(read_shard(manifest, shard), right)


@pytest.mark.parametrize("verify, found", [("first", [True, False]), ("always", [True, True]), ("never", [False] * 2)])
def test_which_readings_are_hashed(make_data, verify, found):
    """Damaged before the first reading; then whole at the first and damaged before the second."""
    for first, expected in ((True, found[0]), (False, found[1])):
        manifest = make_data(SHARDS, name=f"{verify}-{first}")
        reader = ShardReader(manifest, "train", capacity=1, verify=verify)
        _, path = shard_of(manifest)
        if not first:
            reader.tokens(0)
            reader.tokens(1)  # number 0 leaves the memory
        flip(path, a_token(path))
        if expected:
            with pytest.raises(ShardError, match="SHA-256"):
                reader.tokens(0)
        else:
            reader.tokens(0)


def test_the_configuration_reaches_the_reader(make_data):
    manifest = make_data(SHARDS)
    for value in ("first", "always", "never"):
        data = load_config(preset="laptop", overrides=[f"data.path={manifest.folder}", f"data.verify={value}"]).data
        stream = BatchStream(
            open_corpus(data, 4, check=True), "train", seq_length=10, seed=5, global_batch_size=2, micro_batch_size=2,
            dp_rank=0, dp_size=1,
        )  # fmt: skip
        assert [reader._verify for reader in stream.samples.readers] == [value]
    with pytest.raises(UserError, match=r"data\.verify"):
        load_config(preset="laptop", overrides=["data.verify=sometimes"])


CACHE_DAMAGE = {
    "flipped": lambda path: flip(path, a_token(path)),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-1500]),
    "empty": lambda path: path.write_bytes(b""),
    "long": lambda path: path.write_bytes(path.read_bytes() + bytes(512)),
    "gzip": lambda path: path.write_bytes(gzip.compress(path.read_bytes())),
}


@pytest.mark.parametrize("how", CACHE_DAMAGE)
def test_a_damaged_copy_in_the_cache_is_fetched_again_once(make_data, tmp_path, how):
    local = make_data(SHARDS)
    server = FlakyServer(local.folder, lambda file, request: "")
    try:
        manifest = load_manifest(server.url, options=RemoteConfig(cache=str(tmp_path / "cache")))
        shard, path = shard_of(local)
        right = read_shard(local, shard)
        read_shard(manifest, shard)
        for _ in range(2):  # the second time there is nothing to mend
            CACHE_DAMAGE[how](tmp_path / "cache" / "files" / shard.sha256)
            np.testing.assert_array_equal(read_shard(manifest, shard), right)
            np.testing.assert_array_equal(read_shard(manifest, shard), right)
        assert server.requests[shard.file] == 3
        CACHE_DAMAGE[how](tmp_path / "cache" / "files" / shard.sha256)
        flip(path, a_token(path))  # and where it comes from too
        with pytest.raises(ShardError, match=r"cannot be fetched in 1 attempts .*SHA-256"):
            read_shard(
                load_manifest(server.url, options=RemoteConfig(cache=str(tmp_path / "cache"), attempts=1)), shard
            )
    finally:
        server.close()


def test_small_files_in_the_cache_are_mended_too(prepared, tmp_path):
    server = FlakyServer(prepared.folder, lambda file, request: "")
    try:
        options = RemoteConfig(cache=str(tmp_path / "cache"))
        right = streamed_tokens(prepared, "train", 4)
        for _ in range(2):
            manifest = load_manifest(server.url, options=options)
            assert manifest.checked_tokenizer_path().read_bytes() == prepared.tokenizer_path.read_bytes()
            np.testing.assert_array_equal(streamed_tokens(manifest, "train", 4), right)
            shard = manifest.split("train").shards[0]
            for sha256 in (shard.lengths_sha256, manifest.tokenizer_sha256):
                flip(tmp_path / "cache" / "files" / sha256, -1)
        assert server.requests[lengths_file(shard.file)] == server.requests["tokenizer.model"] == 2
    finally:
        server.close()


def test_a_shard_that_is_whole_and_not_what_the_manifest_counts_is_not_fetched_twice(make_data, tmp_path):
    local = make_data([300])
    (shard,) = local.split("train").shards
    wrong = dataclasses.replace(local, splits={"train": Split((dataclasses.replace(shard, tokens=301),))})
    write_atomic(local.folder / FILE_NAME, wrong.to_json().encode())
    server = FlakyServer(local.folder, lambda file, request: "")
    try:
        manifest = load_manifest(server.url, options=RemoteConfig(cache=str(tmp_path / "cache")))
        with pytest.raises(ShardError, match="ends after 300 of 301 tokens"):
            read_shard(manifest, manifest.split("train").shards[0])
        assert server.requests[shard.file] == 1
    finally:
        server.close()


def with_tar(manifest, data, tokens):
    """The folder with this one shard, hashes and size right."""
    import hashlib

    path = manifest.folder / "evil.tar"
    path.write_bytes(data)
    shard = Shard(path.name, 1, tokens, 0, len(data), hashlib.sha256(data).hexdigest())
    return dataclasses.replace(manifest, splits={"train": Split((shard,))}), shard


def tar_of(name, data, size=None, **header):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        for key, value in header.items():
            setattr(member, key, value)
        tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def npy(shape, dtype="<u2", data=b""):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (118 - len(text) - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def claims():
    big = tar_of("0.tokens.npy", npy("(9,)", data=bytes(18)))
    yield "compressed", gzip.compress(big), "it is compressed \\(gzip\\), and a shard is a plain tar"
    for shape in ("(1152921504606846976,)", "(4294967296, 4294967296)", "(9223372036854775808,)", "(-1,)"):
        yield shape, tar_of("0.tokens.npy", npy(shape, data=bytes(18))), "an array"
    yield "objects", tar_of("0.tokens.npy", npy("(9,)", "|O", bytes(72))), "no array of numbers"
    yield "member", tar_of("0.tokens.npy", npy("(9,)"), pax_headers={"size": str(2**60)}), r"1152921504606846976 bytes"
    sparse = {"GNU.sparse.size": str(2**40), "GNU.sparse.numblocks": "0", "GNU.sparse.major": "0"}
    yield "sparse", tar_of("0.tokens.npy", b"", pax_headers={**sparse, "GNU.sparse.map": "0,0"}), "sparse"


@pytest.mark.parametrize("data, message", [pytest.param(*rest, id=name) for name, *rest in claims()])
def test_what_a_file_claims_takes_no_memory(make_data, data, message):
    manifest, shard = with_tar(make_data([10]), data, 9)
    tracemalloc.start()
    try:
        with pytest.raises(ShardError, match=f"evil.tar is damaged.*{message}") as caught:
            read_shard(manifest, shard)
        with pytest.raises(UserError, match=r"evil\.tar is damaged"):
            list(inspection._documents(manifest, shard))
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_tokens_that_do_not_fit_into_the_file_take_no_memory(make_data):
    data = tar_of("0.tokens.npy", npy("(9,)", data=bytes(18)))
    manifest, shard = with_tar(make_data([10]), data, 2**60)
    with pytest.raises(ShardError, match=f"says {2**60} tokens in {len(data)}"):
        read_shard(manifest, shard)


def test_a_sidecar_is_read_as_far_as_its_documents_go(prepared, tmp_path):
    import shutil

    folder = shutil.copytree(prepared.folder, tmp_path / "copy")
    manifest = load_manifest(folder)
    path = folder / lengths_file(manifest.split("train").shards[0].file)
    with open(path, "ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=rf"{path.name} is damaged: SHA-256"):
        streamed_tokens(manifest, "train", 4)


@given(
    st.sampled_from(["<u2", "<u4", "|u1", ">i8", "<f4"]),
    st.lists(st.integers(0, 5), max_size=3),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_arrays_come_back(dtype, shape, fortran):
    array = np.arange(math.prod(shape)).astype(dtype).reshape(shape, order="F" if fortran else "C")
    file = io.BytesIO()
    np.save(file, array)
    found = decode_array(file.getvalue())
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    for other in (file.getvalue() + b"\0", file.getvalue()[:-1]):
        with pytest.raises(ValueError):
            decode_array(other)


@given(st.integers(0, 127), st.binary(min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_a_garbled_array_is_a_value_error_or_an_array_of_its_bytes(at, garbage):
    data = bytearray(npy("(9,)", data=bytes(18)))
    data[at : at + len(garbage)] = garbage
    try:
        found = decode_array(bytes(data))
    except ValueError:
        return
    assert found.nbytes <= len(data)
