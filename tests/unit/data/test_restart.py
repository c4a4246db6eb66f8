"""Killed anywhere and run again, a prepare ends with the bytes of one that nothing disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from mbit_data import array, lock, work, write
from mbit_data import prepare as prepare_module
from mbit_data.journal import Journal
from mbit_data.options import Part, PrepareOptions
from mbit_data.prepare import UNFINISHED_FILE, prepare
from mbit_data.progress import Reporter
from mbit_data.verify import verify

from megatron_bit.data.manifest import FILE_NAME, load_manifest
from megatron_bit.errors import UserError

LETTERS = random.Random(7)
WORDS = ["".join(LETTERS.choices("abcdefghijklmnop", k=LETTERS.randint(2, 8))) for _ in range(3000)]


class Killed(BaseException):
    """Like SIGKILL: nothing in the code catches it, and nothing below `finally` may matter."""


def mixed_corpus(folder, seed=0, records=120, words=40):
    """Text, JSON lines under zstd, and Parquet, with copies and empty and damaged records."""
    generator = random.Random(seed)
    folder.mkdir()

    def text():
        return " ".join(generator.choices(WORDS, k=generator.randint(1, words)))

    texts = [text() for _ in range(records)]
    for i in range(0, records, 12):
        (folder / f"a{i:03d}.txt").write_text(texts[i] + "\n")
    lines = [json.dumps({"text": t}) for t in texts[::2]] + ['{"text": null}', "{}", '{"text": " "}']
    generator.shuffle(lines)
    (folder / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress("\n".join(lines).encode()))
    pq.write_table(pa.table({"text": [*texts[1::2], None, text()]}), folder / "c.parquet", row_group_size=20)
    return folder


@pytest.fixture
def options(tmp_path):
    return PrepareOptions(
        (str(mixed_corpus(tmp_path / "corpus")),), tmp_path / "out", vocab_size=500, model_type="bpe", workers=1,
        validation_fraction=0.2, shard_tokens=500, on_error="skip", dedup="exact",
    )  # fmt: skip


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_at(monkeypatch, owner, name, call, before):
    """`owner.name` ends the process, as it were, at its `call`-th call: before or after doing its work."""
    real, count = getattr(owner, name), [0]

    def dying(*args, **kwargs):
        count[0] += 1
        if before and count[0] >= call:
            raise Killed
        result = real(*args, **kwargs)
        if count[0] >= call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "owner, name, calls",
    [
        (Journal, "add", (1, 1, 2, 3)),
        (write._ShardFile, "finish", (1, 2, 1, 4)),
        (write._ShardFile, "add", (1, 30, 7, 60)),
        (os, "replace", (1, 2, 3, 4, 5, 6)),
        (work, "train_tokenizer", (1,)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_killed_again_and_again_at_the_same_step(options, tmp_path, monkeypatch, owner, name, calls, before):
    expected = contents(prepare(replace(options, out=tmp_path / "undisturbed"), progress=False).folder)
    assert len(expected) > 6
    for call in calls:
        with monkeypatch.context() as patch:
            kill_at(patch, owner, name, call, before)
            # abandon removes what is half written; a killed process has no time for that
            patch.setattr(write.SplitWriter, "abandon", lambda self: None)
            with pytest.raises(Killed):
                prepare(options, progress=False)
        with pytest.raises(UserError, match="did not finish"):
            load_manifest(options.out)
    prepare(options, progress=False)
    assert contents(options.out) == expected
    assert not verify(options.out)


def test_killed_between_the_manifest_and_the_end(options, tmp_path, monkeypatch):
    expected = contents(prepare(replace(options, out=tmp_path / "undisturbed"), progress=False).folder)
    with monkeypatch.context() as patch:
        kill_at(patch, prepare_module, "write_manifest", 1, before=False)
        with pytest.raises(Killed):
            prepare(options, progress=False)
    assert set(contents(options.out)) - set(expected) == {UNFINISHED_FILE, "dedup.keys"}
    prepare(options, progress=False)
    assert contents(options.out) == expected


def test_finished_shards_are_kept_and_not_made_again(options, tmp_path, monkeypatch, capsys):
    expected = contents(prepare(replace(options, out=tmp_path / "undisturbed"), progress=False).folder)
    with monkeypatch.context() as patch:
        kill_at(patch, Journal, "add", 4, before=False)
        with pytest.raises(Killed):
            prepare(options, progress=False)
    shards = {path: path.stat().st_mtime_ns for path in options.out.glob("*.tar")}
    assert len(shards) == 4
    encoded = []
    tokenizer = work.tokenize._load.__wrapped__
    monkeypatch.setattr(work.tokenize, "_load", lambda *a: counting(tokenizer(*a), encoded))
    prepare(options)
    assert "4 finished shards are kept" in capsys.readouterr().err
    assert contents(options.out) == expected
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    total = sum(split.documents for split in load_manifest(options.out).splits.values())
    kept = sum(json.loads(line)["documents"] for line in shard_lines(options.out, shards))
    assert len(encoded) == total - kept


def counting(tokenizer, calls):
    real = tokenizer.encode
    tokenizer.encode = lambda text: (calls.append(text), real(text))[1]
    return tokenizer


def shard_lines(folder, shards):
    manifest = json.loads((folder / FILE_NAME).read_text())
    names = {path.name for path in shards}
    return [json.dumps(s) for split in manifest["splits"].values() for s in split["shards"] if s["file"] in names]


def interrupted(options, monkeypatch, shards=3):
    with monkeypatch.context() as patch:
        kill_at(patch, Journal, "add", shards, before=False)
        with pytest.raises(Killed):
            prepare(options, progress=False)


def test_a_damaged_shard_and_those_behind_it_are_made_again(options, tmp_path, monkeypatch):
    expected = contents(prepare(replace(options, out=tmp_path / "undisturbed"), progress=False).folder)
    interrupted(options, monkeypatch, 8)
    assert (options.out / "train-000004.tar").exists()
    damaged = options.out / "train-000001.tar"
    data = bytearray(damaged.read_bytes())
    data[700] ^= 1
    damaged.write_bytes(data)
    journal = options.out / UNFINISHED_FILE
    journal.write_bytes(journal.read_bytes()[:-5])  # and its last line is torn
    interrupted(options, monkeypatch, 1)
    prepare(options, progress=False)
    assert contents(options.out) == expected


def test_other_options_inputs_or_tokenizers_are_not_mixed_in(options, tmp_path, monkeypatch, prepared, capsys):
    interrupted(options, monkeypatch)
    before = contents(options.out)
    for other, message in [
        ({"shard_tokens": 400}, r"unfinished prepare of other data: shard_tokens \(500 there, 400 here\)"),
        ({"tokenizer": prepared.tokenizer_path, "vocab_size": None, "model_type": None}, "other data: tokenizer"),
        ({"dedup": None}, "other data: dedup"),
        ({"inputs": (str(tmp_path / "corpus" / "a000.txt"),)}, "other data: input_sha256"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(replace(options, **other), progress=False)
        assert contents(options.out) == before
    (options.out / "tokenizer.model").write_bytes(prepared.tokenizer_path.read_bytes())
    with pytest.raises(UserError, match=r"tokenizer in .* was changed"):
        prepare(options, progress=False)
    (options.out / "tokenizer.model").write_bytes(before["tokenizer.model"])
    monkeypatch.setattr("mbit_data.prepare.code_sha256", lambda: "0" * 64)
    prepare(options)
    assert "by other code is here: begun again" in capsys.readouterr().err
    assert load_manifest(options.out).code_sha256 == "0" * 64 and not verify(options.out)


def test_without_a_finished_shard_other_options_may_begin_again(options, tmp_path, monkeypatch, prepared, capsys):
    with monkeypatch.context() as patch:
        kill_at(patch, work, "write_shards", 1, before=True)
        patch.setattr(prepare_module, "write_shards", work.write_shards)
        with pytest.raises(Killed):
            prepare(options, progress=False)
    assert (options.out / "tokenizer.model").exists() and (options.out / "dedup.keys").exists()
    other = replace(options, tokenizer=prepared.tokenizer_path, vocab_size=None, model_type=None, dedup=None)
    assert prepare(other).tokenizer_sha256 == prepared.tokenizer_sha256
    assert "without a finished shard, is replaced (tokenizer" in capsys.readouterr().err
    assert contents(options.out) == contents(prepare(replace(other, out=tmp_path / "fresh"), progress=False).folder)


def test_a_damaged_record_stops_and_skip_goes_on(options, tmp_path, prepared, capsys, monkeypatch):
    """What was finished before the damage is not made again only because the user now says what to do with it."""
    monkeypatch.setattr("mbit_data.pool.TASK_CHARS", 200)  # else all text is one task, which the damage ends
    given = {"tokenizer": prepared.tokenizer_path, "vocab_size": None, "model_type": None}
    options = replace(options, dedup=None, shard_tokens=100, **given)
    expected = contents(prepare(replace(options, out=tmp_path / "undisturbed"), progress=False).folder)
    with pytest.raises(UserError, match=r"b\.jsonl\.zst, line \d+: .*--on-error skip"):
        prepare(replace(options, on_error="stop"), progress=False)
    assert (options.out / "train-000000.tar").exists()
    prepare(options)
    assert "finished shards are kept" in capsys.readouterr().err
    assert contents(options.out) == expected


def test_two_at_once_are_refused(options, tmp_path, monkeypatch):
    """Also a part of an array; a second part may run beside it."""
    busy = {"at": None}
    real = work.write_shards

    def while_writing(*args):
        before = contents(options.out)
        with pytest.raises(UserError, match=f"another prepare is at work on .*{busy['at']}"):
            run(task)
        assert contents(options.out) == before
        if busy["at"] != "out":
            monkeypatch.setattr(array, "write_shards", real)
            run(replace(task, part=Part(1, 2)))
        return real(*args)

    monkeypatch.setattr(prepare_module, "write_shards", while_writing)
    monkeypatch.setattr(array, "write_shards", while_writing)
    run, task = (lambda one: prepare(one, progress=False)), options
    busy["at"] = "out"
    run(task)
    task = replace(options, part=Part(0, 2), out=tmp_path / "parts", dedup=None)
    options = task
    run = lambda one: array.prepare_part(one, progress=False)  # noqa: E731
    busy["at"] = r"part-0000-of-0002\.lock"
    run(task)
    array.join(task.out, progress=False)
    assert not list(task.out.glob("*.lock")) and not verify(task.out)


def test_a_lock_file_that_was_just_removed_does_not_count(tmp_path, monkeypatch):
    real = lock.fcntl.flock

    def too_late(descriptor, how):
        real(descriptor, how)
        (tmp_path / "part.lock").unlink()

    with lock.only_one(tmp_path / "part.lock", Reporter(False)):
        assert (tmp_path / "part.lock").exists()
    assert not (tmp_path / "part.lock").exists()
    monkeypatch.setattr(lock.fcntl, "flock", too_late)
    with (
        pytest.raises(UserError, match="another prepare is at work"),
        lock.only_one(tmp_path / "part.lock", Reporter(False)),
    ):
        pass


def test_killed_for_real_at_random_moments(tmp_path):
    """SIGKILL to a process with workers, at moments the clock chooses."""
    corpus = mixed_corpus(tmp_path / "corpus", seed=5, records=800, words=400)
    base = [
        sys.executable, "-m", "megatron_bit", "prepare", str(corpus), "--vocab-size", "1500", "--shard-tokens", "30000",
        "--on-error", "skip", "--dedup", "near", "--workers", "2", "--out",
    ]  # fmt: skip
    subprocess.run([*base, str(tmp_path / "undisturbed")], check=True, stderr=subprocess.DEVNULL)
    generator, out, kills = random.Random(), tmp_path / "out", 0
    for shards in (0, generator.randint(1, 4), generator.randint(5, 9)):
        process = subprocess.Popen([*base, str(out)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while process.poll() is None and len(list(out.glob("*.tar"))) < shards and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.4 if shards == 0 else 0.02))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    subprocess.run([*base, str(out)], check=True, stderr=subprocess.DEVNULL)
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert not verify(out)
