"""Documents in whole blocks, what says so before a shard is read, and where documents begin in a batch."""

import dataclasses
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mbit_data.tokenize import TokenizedDocument
from mbit_data.verify import verify
from mbit_data.write import SplitWriter

from megatron_bit.data.batches import BatchStream
from megatron_bit.data.corpus import Corpus
from megatron_bit.data.documents import document_starts
from megatron_bit.data.manifest import FILE_NAME, Split, lengths_file, load_manifest
from megatron_bit.data.stream import read_documents, read_shard, streamed_tokens
from megatron_bit.errors import UserError
from megatron_bit.io.files import write_atomic

EOS = 0


def write_documents(manifest, shards):
    """The folder of `manifest` with these documents instead: [[ids, ...] of each shard, ...]; every one ends in EOS."""
    found = []
    for number, documents in enumerate(shards):
        writer = SplitWriter(manifest.folder, f"d{number}", shard_tokens=10**9)
        for i, ids in enumerate(documents):
            tokens = np.array(ids, dtype=np.uint16)
            writer.add(f"{i:04d}", TokenizedDocument("x.txt", i, tokens, len(ids), b"", 0))
        found += writer.finish().shards
    changed = dataclasses.replace(manifest, splits={"train": Split(tuple(found))}, eos_id=EOS)
    write_atomic(manifest.folder / FILE_NAME, changed.to_json().encode())
    return load_manifest(manifest.folder)


def document(generator, length):
    return [*generator.integers(1, 1000, length - 1).tolist(), EOS]


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=1, max_size=4),
    block_size=st.integers(1, 9),
    blocks=st.integers(1, 4),
    seed=st.integers(0, 2**40),
)
def test_no_block_has_two_documents_and_no_token_is_lost(make_data_once, shards, block_size, blocks, seed):
    generator = np.random.default_rng(seed)
    documents = [[document(generator, length) for length in lengths] for lengths in shards]
    manifest = write_documents(make_data_once, documents)
    corpus, seq_length = Corpus.of(manifest, block_size), block_size * blocks
    totals = [sum(-(-len(ids) // block_size) * block_size for ids in shard) for shard in documents]
    assert corpus.sources[0].tokens["train"].tolist() == totals
    if max(totals) < seq_length:
        return
    stream = BatchStream(
        corpus, "train", seq_length=seq_length, seed=seed, global_batch_size=1, micro_batch_size=1, dp_rank=0,
        dp_size=1, prefetch=0, start_blocks=block_size,
    )  # fmt: skip
    epoch = stream.samples.before_repeat
    assert epoch == sum(total // seq_length for total in totals)
    seen = {}
    for number, (batch,) in zip(range(epoch), stream.steps(0), strict=False):
        _, _, shard, sample = stream.samples.locate(number)
        seen[shard, sample] = batch
    for shard, shard_documents in enumerate(documents):
        whole = [[*ids, *[EOS] * (-len(ids) % block_size)] for ids in shard_documents]
        flat = [token for ids in whole for token in ids]
        owner = [i for i, ids in enumerate(whole) for _ in ids]
        for sample in range(len(flat) // seq_length):
            part = slice(sample * seq_length, (sample + 1) * seq_length)
            batch = seen.pop((shard, sample))
            assert batch.tokens[0].tolist() == flat[part]
            owners = owner[part]
            assert batch.start[0].tolist() == [owners.index(o) for o in owners]
    assert not seen


@pytest.fixture(scope="module")
def make_data_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    writer = SplitWriter(folder, "s", shard_tokens=10)
    writer.add("0", TokenizedDocument("x.txt", 0, np.array([1, EOS], dtype=np.uint16), 2, b"", 0))
    write_atomic(folder / "tokenizer.model", b"none")
    from megatron_bit.data.manifest import Manifest

    digest = hashlib.sha256(b"none").hexdigest()
    return Manifest(folder, {"train": writer.finish()}, "tokenizer.model", digest, 1000, EOS, "uint16", {}, "0")


def test_starts_are_known_from_the_blocks_before():
    tokens = np.array([[5, EOS, 5, 5, 5, EOS, EOS, 5, 5, 5, 5, EOS]])
    assert document_starts(tokens, EOS, 1)[0].tolist() == [0, 0, 2, 2, 2, 2, 6, 7, 7, 7, 7, 7]
    assert document_starts(tokens, EOS, 2)[0].tolist() == [0, 0, 2, 2, 2, 2, 6, 6, 8, 8, 8, 8]
    assert document_starts(tokens, EOS, 3)[0].tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9]
    assert document_starts(tokens, EOS, 12)[0].tolist() == [0] * 12


def test_prepare_writes_the_lengths(prepared):
    for split in prepared.splits.values():
        for shard in split.shards:
            lengths = np.load(prepared.folder / lengths_file(shard.file), allow_pickle=False)
            documents = list(read_documents(prepared.shard_path(shard)))
            assert lengths.dtype == np.uint32 and lengths.tolist() == [len(ids) for ids in documents]
            filled = [np.pad(ids, (0, -len(ids) % 4), constant_values=prepared.eos_id) for ids in documents]
            total = sum(map(len, filled))
            np.testing.assert_array_equal(read_shard(prepared, shard, 4, total), np.concatenate(filled))
    assert streamed_tokens(prepared, "train", 1).sum() == prepared.split("train").tokens


def test_a_folder_of_before_streams_but_cannot_be_aligned(prepared):
    shards = tuple(dataclasses.replace(s, lengths_sha256="") for s in prepared.split("train").shards)
    old = dataclasses.replace(prepared, splits={"train": Split(shards)})
    assert old.fingerprint == dataclasses.replace(prepared, splits={"train": prepared.split("train")}).fingerprint
    assert Corpus.of(old).sources[0].tokens["train"].sum() == old.split("train").tokens
    with pytest.raises(UserError, match=r"data\.align_blocks needs the lengths .* prepare it again"):
        Corpus.of(old, 4)


def test_lengths_that_are_gone_damaged_or_of_other_documents(make_data):
    manifest = make_data([100, 200])
    path = manifest.folder / lengths_file(manifest.split("train").shards[1].file)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{path.name} is damaged: SHA-256 [0-9a-f]{{64}}, the manifest says"):
        Corpus.of(manifest, 4)
    assert [problem for problem in verify(manifest.folder) if path.name in problem and "SHA-256" in problem]
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} cannot be read"):
        Corpus.of(manifest, 4)
    assert Corpus.of(manifest).manifest is manifest  # nobody asked for lengths
    shard = manifest.split("train").shards[0]
    with pytest.raises(UserError, match=rf"{shard.file} ends after 100 of 100 tokens"):
        read_shard(manifest, shard, 4, 112)
