"""Preparing: the same bytes from the same input, nothing half-finished, errors that say what to do."""

import errno
import gzip
import hashlib
import lzma
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
from mbit_data import write
from mbit_data.inputs import expand_inputs
from mbit_data.prepare import PrepareOptions, prepare
from mbit_data.read import SPLIT_ABOVE, read_documents
from mbit_data.train_tokenizer import sample_texts
from mbit_data.verify import verify

from megatron_bit.data.manifest import FILE_NAME, load_manifest
from megatron_bit.data.stream import read_documents as read_shard_documents
from megatron_bit.data.tokenizer import Tokenizer
from megatron_bit.errors import UserError


def options(corpus, out, **others):
    defaults = {"vocab_size": 400, "validation_fraction": 0.2, "shard_tokens": 4000, "workers": 1}
    return PrepareOptions(inputs=(str(corpus),), out=out, **{**defaults, **others})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_bytes_for_every_worker_count(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("mbit_data.pool.TASK_CHARS", 2000)  # many tasks
    one = prepare(options(corpus, tmp_path / "one"), progress=False)
    three = prepare(options(corpus, tmp_path / "three", workers=3), progress=False)
    assert contents(one.folder) == contents(three.folder)
    assert one.fingerprint == three.fingerprint
    names = sorted(contents(one.folder))
    assert names[:4] == [FILE_NAME, "tokenizer.model", "train-000000.lengths.npy", "train-000000.tar"]
    assert len(names) > 7
    assert "unfinished.jsonl" not in names
    assert not verify(one.folder)


def test_every_document_comes_back_from_one_of_the_splits(prepared):
    tokenizer = Tokenizer(prepared.tokenizer_path)
    files = expand_inputs([str(prepared.folder.parent / "corpus")])
    expected = {file.path.read_bytes().decode() for file in files}
    found = []
    for name, split in prepared.splits.items():
        texts = []
        for shard in split.shards:
            documents = list(read_shard_documents(prepared.shard_path(shard)))
            assert all(document[-1] == prepared.eos_id for document in documents)
            assert all(document.dtype == np.uint16 for document in documents)
            assert sum(map(len, documents)) == shard.tokens and len(documents) == shard.documents
            texts += [tokenizer.decode(document) for document in documents]
            assert shard.size == prepared.shard_path(shard).stat().st_size
        assert 0 < len(texts) == split.documents
        assert split.text_bytes == sum(len(text.encode()) for text in texts)
        chosen = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 for text in texts]
        assert all((position < 0.2) == (name == "validation") for position in chosen)
        found += texts
    assert len(found) == len(expected) and set(found) == expected


def test_a_finished_folder_is_left_alone(corpus, tmp_path, capsys):
    first = prepare(options(corpus, tmp_path / "out"), progress=False)
    times = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert prepare(options(corpus, tmp_path / "out", workers=2)) == first
    assert "nothing to do" in capsys.readouterr().err
    assert times == {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    with pytest.raises(UserError, match=r"out holds other data: shard_tokens \(4000 there, 5000 here\)"):
        prepare(options(corpus, tmp_path / "out", shard_tokens=5000), progress=False)
    (corpus / "file001.py").write_text("changed")
    with pytest.raises(UserError, match="input_sha256"):
        prepare(options(corpus, tmp_path / "out"), progress=False)


def test_an_interrupted_run_leaves_no_manifest_and_is_begun_again(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    finish = write._ShardFile.finish

    def fail_at_second(self, check):
        if self.path.name == "train-000001.tar":
            raise KeyboardInterrupt
        return finish(self, check)

    monkeypatch.setattr(write._ShardFile, "finish", fail_at_second)
    with pytest.raises(KeyboardInterrupt):
        prepare(options(corpus, out), progress=False)
    assert (out / "train-000000.tar").exists()
    assert not [path for path in out.iterdir() if path.suffix == ".partial"]
    with pytest.raises(UserError, match="did not finish"):
        load_manifest(out)
    monkeypatch.undo()
    (out / "train-000099.tar").write_bytes(b"left over")
    again = prepare(options(corpus, out), progress=False)
    assert contents(out) == contents(prepare(options(corpus, tmp_path / "fresh"), progress=False).folder)
    assert not verify(again.folder)


def test_a_killed_run_leaves_no_processes_and_can_be_repeated(prepared, tmp_path):
    """The real thing: SIGKILL while the workers tokenize."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(16):
        (corpus / f"{number}.py").write_text(f"x_{number} = 'some text' * 12345\n" * 20_000)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom mbit_data.prepare import PrepareOptions, prepare\n"
        "if __name__ == '__main__':\n"
        "    prepare(PrepareOptions((sys.argv[1],), Path(sys.argv[2]), Path(sys.argv[3]), workers=2))\n"
    )
    command = [sys.executable, script, corpus, tmp_path / "out", prepared.tokenizer_path]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    parent = psutil.Process(process.pid)
    workers = wait_for(lambda: [p for p in parent.children() if "spawn_main" in " ".join(p.cmdline())])
    wait_for(lambda: list((tmp_path / "out").glob("*.partial")))
    process.kill()
    process.wait()
    assert not psutil.wait_procs(workers, timeout=10)[1]
    assert not (tmp_path / "out" / FILE_NAME).exists()
    subprocess.run(command, stderr=subprocess.DEVNULL, check=True)
    assert not verify(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.partial"))


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return result


def test_a_folder_of_others_is_not_touched(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        prepare(options(corpus, tmp_path / "out"), progress=False)
    assert contents(tmp_path / "out") == {"thesis.txt": b"mine"}


def test_a_full_disk_is_a_user_error(corpus, tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write._HashingFile, "write", full)
    with pytest.raises(UserError, match=r"cannot write to .*out: No space left.*free disk space"):
        prepare(options(corpus, tmp_path / "out"), progress=False)
    assert not (tmp_path / "out" / FILE_NAME).exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        prepare(options(corpus, tmp_path / "file" / "out"), progress=False)


def test_an_existing_tokenizer_is_used(corpus, prepared, tmp_path):
    given = prepared.tokenizer_path
    manifest = prepare(
        options(corpus, tmp_path / "out", tokenizer=given, vocab_size=None, shard_tokens=10**6),
        progress=False,
    )
    assert manifest.tokenizer_path.read_bytes() == given.read_bytes()
    assert manifest.vocab_size == 400
    for wrong, message in [
        ({"vocab_size": 500}, "vocab_size is 500.* 400 pieces"),
        ({"vocab_size": None, "model_type": "bpe"}, "model_type is for training"),
        ({"vocab_size": None, "tokenizer_sample_bytes": 5}, "tokenizer_sample_bytes is for training"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(options(corpus, tmp_path / "other", tokenizer=given, **wrong), progress=False)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"vocab_size": 100}, "vocab_size is 100; allowed"),
        ({"vocab_size": 100_000}, "vocab_size is 100000.*only"),
        ({"model_type": "word"}, "model_type is 'word'"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"shard_tokens": 0}, "shard_tokens is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"inputs": ()}, "no input files"),
        ({"inputs": ("nowhere.txt",)}, "'nowhere.txt' does not exist"),
        ({"inputs": ("*.nothing",)}, "no files in it"),
    ],
)
def test_wrong_options_are_user_errors(corpus, tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        prepare(replace(options(corpus, tmp_path / "out"), **wrong), progress=False)
    assert not (tmp_path / "out" / FILE_NAME).exists()


def test_verify_names_the_damaged_shard(corpus, tmp_path):
    manifest = prepare(options(corpus, tmp_path / "out"), progress=False)
    path = manifest.folder / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    problems = verify(manifest.folder)
    assert len(problems) == 1 and "train-000001.tar: content changed" in problems[0]
    path.unlink()
    manifest.tokenizer_path.write_bytes(b"x")
    assert ["tokenizer" in problems for problems in verify(manifest.folder)] == [True, False]
    assert "cannot be read" in verify(manifest.folder)[1]


def documents_of(*inputs):
    return [d.text for file in expand_inputs([str(i) for i in inputs]) for d in read_documents(file)]


def test_large_txt_files_are_split_at_two_blank_lines(tmp_path):
    parts = ["= A =\n\none\n", "= B =\r\n\r\ntwo\r\n", "x" * SPLIT_ABOVE + "\n", "last, without line end"]
    text = "\n\n\n" + parts[0] + "\n\n" + parts[1] + "\r\n\r\n\r\n" + parts[2] + "\n\n\n\n" + parts[3]
    for name, opener in [("a.txt", open), ("a.txt.gz", gzip.open), ("a.txt.xz", lzma.open)]:
        with opener(tmp_path / name, "wb") as file:
            file.write(text.encode())
        assert documents_of(tmp_path / name) == parts
    (tmp_path / "a.py").write_text(text, newline="")
    assert documents_of(tmp_path / "a.py") == [text]
    (tmp_path / "end.txt").write_text("x" * SPLIT_ABOVE + "\n\n\n\n")
    assert documents_of(tmp_path / "end.txt") == ["x" * SPLIT_ABOVE + "\n"]
    small = "one\n\n\n\ntwo\n"
    (tmp_path / "small.txt").write_text(small)
    assert documents_of(tmp_path / "small.txt") == [small]


def test_inputs_in_a_fixed_order_without_repeats(tmp_path):
    for name in ["b.txt", "a.txt", "sub/c.md", ".hidden.txt", ".git/d.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents_of(tmp_path) == ["a.txt", "b.txt", "sub/c.md"]
    assert documents_of(tmp_path / "b.txt", tmp_path, tmp_path / "*.txt") == ["b.txt", "a.txt", "sub/c.md"]
    assert documents_of(tmp_path / "**" / "*.md") == ["sub/c.md"]
    twice = expand_inputs([str(tmp_path / "sub"), str(tmp_path)])
    assert [f.source for f in twice] == ["c.md", "a.txt", "b.txt"]
    assert [f.source for f in expand_inputs([str(tmp_path)], exclude=tmp_path / "sub")] == ["a.txt", "b.txt"]


def test_stdlib_is_sources_without_tests():
    sources = [file.source for file in expand_inputs(["stdlib"])]
    assert {"abc.py", "json/decoder.py"} <= set(sources)
    assert sources == sorted(sources)
    folders = {part for source in sources for part in source.split("/")[:-1]}
    assert not folders & {"site-packages", "test", "tests", "__pycache__", "idle_test"}


def test_files_that_are_not_text(corpus, tmp_path, capsys):
    (corpus / "image.png").write_bytes(b"\x89PNG\0\0")
    (corpus / "empty.py").write_text("")
    manifest = prepare(options(corpus, tmp_path / "out"))
    assert sum(split.documents for split in manifest.splits.values()) == 40
    assert "left out: 1 binary file (" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"image\.png is binary"):
        prepare(options(corpus / "image.png", tmp_path / "x"), progress=False)
    with pytest.raises(UserError, match="empty"):
        prepare(options(corpus / "empty.py", tmp_path / "x"), progress=False)
    (corpus / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 100)[:-12])
    with pytest.raises(UserError, match=r"cut\.txt\.gz is damaged"):
        prepare(options(corpus / "cut.txt.gz", tmp_path / "x"), progress=False)


def test_the_tokenizer_sample_is_bounded(corpus):
    files = expand_inputs([str(corpus)])
    total = sum(file.size for file in files)
    sample = list(sample_texts(files, total // 3))
    assert total // 3 <= sum(len(text.encode()) for text in sample) < total // 3 + 4
    assert list(sample_texts(files, total // 3)) == sample
    assert sum(len(text.encode()) for text in sample_texts(files, 10 * total)) == total
