"""A prepare in parts holds what a single process makes: the same documents in the same order and splits."""

import io
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mbit_data import array
from mbit_data.array import join, part_from_environment, prepare_part, share_of
from mbit_data.input_file import InputFile
from mbit_data.journal import Journal
from mbit_data.options import Part, PrepareOptions
from mbit_data.prepare import prepare
from mbit_data.verify import verify

from megatron_bit.data.manifest import SPLITS, load_manifest
from megatron_bit.errors import UserError


@pytest.fixture
def options(corpus, tmp_path):
    (corpus / "file003.py").write_bytes((corpus / "inner" / "file006.py").read_bytes())  # copies in two parts
    (corpus / "zz.bin").write_bytes(b"\0" * 3000)
    (corpus / "zzz.py").write_text(" ")
    return PrepareOptions((str(corpus),), tmp_path / "out", vocab_size=400, validation_fraction=0.2, shard_tokens=4000,
                          workers=1)  # fmt: skip


def parts(options, count, **others):
    return [replace(options, part=Part(index, count), **others) for index in range(count)]


def documents(manifest):
    """For each split, (metadata, payload) of every document in the order of the manifest; and all keys."""
    found, names = {}, []
    for split in SPLITS:
        found[split] = []
        for shard in manifest.split(split).shards:
            with tarfile.open(manifest.shard_path(shard)) as tar:
                members = {member.name: tar.extractfile(member).read() for member in tar}
            names += members
            about = [data for name, data in members.items() if name.endswith(".json")]
            tokens = [data for name, data in members.items() if name.endswith(".npy")]
            found[split] += list(zip(about, tokens, strict=True))
    assert len(set(names)) == len(names)
    return found


@pytest.mark.parametrize("dedup", [None, "exact"])
@pytest.mark.parametrize("count", [1, 3, 50])
def test_parts_in_any_order_hold_what_one_process_makes(options, tmp_path, dedup, count):
    options = replace(options, dedup=dedup)
    one = prepare(replace(options, out=tmp_path / "one"), progress=False)
    tasks = parts(options, count)
    if dedup:
        waiting = [prepare_part(task, progress=False).waiting for task in reversed(tasks)]
        assert waiting[:-1] == [tuple(range(index)) for index in reversed(range(1, count))] and waiting[-1] == ()
    for task in reversed(tasks):
        assert prepare_part(task, progress=False).splits is not None
    joined = join(options.out, progress=False)
    assert documents(joined) == documents(one)
    assert joined.dropped == one.dropped and joined.dropped["empty"] == 1
    assert ("exact duplicate" in one.dropped) == bool(dedup)
    assert joined.tokenizer_path.read_bytes() == one.tokenizer_path.read_bytes()
    assert {**joined.identity} == {**one.identity, "parts": count}
    assert (joined.vocab_size, joined.eos_id, joined.dtype) == (one.vocab_size, one.eos_id, one.dtype)
    assert not verify(joined.folder) and load_manifest(joined.folder) == joined
    assert join(options.out, progress=False) == joined
    assert not list(options.out.glob("*.keys")) and not list(options.out.glob("*.partial"))


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_shares_are_consecutive_and_fair(sizes, count):
    files = [InputFile(f"/x/{i}", str(i), size, False, 0) for i, size in enumerate(sizes)]
    shares = [share_of(files, Part(index, count)) for index in range(count)]
    assert [file for share in shares for file in share] == files
    for share in shares:
        assert sum(file.size for file in share) <= sum(sizes) / count + max(sizes, default=0) + 1e-9


def test_parts_are_finished_once_and_begun_again(options, tmp_path, monkeypatch, capsys):
    tasks = parts(options, 2)
    real, added = Journal.add, []

    def dying(self, split, shard, last):
        real(self, split, shard, last)
        added.append(shard.file)
        if len(added) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", dying)
        with pytest.raises(KeyboardInterrupt):
            prepare_part(tasks[0], progress=False)
    prepare_part(tasks[1], progress=False)  # leaves the other part's shards alone
    with pytest.raises(UserError, match="part 0 of 2 parts not finished"):
        join(options.out)
    prepare_part(tasks[0])
    assert "2 finished shards are kept" in capsys.readouterr().err
    times = {path: path.stat().st_mtime_ns for path in options.out.iterdir()}
    prepare_part(tasks[0])
    assert "nothing to do, part 0 of 2 is finished" in capsys.readouterr().err
    assert times == {path: path.stat().st_mtime_ns for path in options.out.iterdir()}
    undisturbed = parts(replace(options, out=tmp_path / "undisturbed"), 2)
    for task in undisturbed:
        prepare_part(task, progress=False)
    assert join(options.out, progress=False).fingerprint == join(tmp_path / "undisturbed", progress=False).fingerprint


def test_what_does_not_belong_together_is_refused(options, tmp_path, prepared, monkeypatch):
    first, second = parts(options, 2)
    prepare_part(first, progress=False)
    for other, message in [
        ({"part": Part(1, 3)}, r"array of other data: parts \(2 there, 3 here\).*--array-count"),
        ({"shard_tokens": 100}, "array of other data: shard_tokens"),
        ({"tokenizer": prepared.tokenizer_path, "vocab_size": None}, "array of other data: tokenizer"),
        ({"inputs": (str(tmp_path / "corpus" / "inner"),)}, "array of other data: listing_sha256"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare_part(replace(second, **other), progress=False)
    with pytest.raises(UserError, match="not empty and not a data folder"):
        prepare(options, progress=False)
    changed = next(iter((tmp_path / "corpus").glob("*.py")))
    changed.write_bytes(changed.read_bytes().swapcase())
    with pytest.raises(UserError, match="holds part 0 of 2 of other data: content"):
        prepare_part(first, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(array, "code_sha256", lambda: "other")
        with pytest.raises(UserError, match="begun by other code"):
            prepare_part(second, progress=False)
    prepare_part(second, progress=False)
    shard = next(iter(options.out.glob("train-0001-*.tar")))
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    with pytest.raises(UserError, match=f"{shard.name} has {len(data) - 512} bytes"):
        join(options.out, progress=False)
    shard.write_bytes(data)
    joined = join(options.out, progress=False)
    with pytest.raises(UserError, match=r"holds other data: .*parts \(2 there, None here\)"):
        prepare(replace(options, inputs=(str(tmp_path / "corpus"),)), progress=False)
    assert joined.splits
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and not the folder of an array"):
        prepare_part(replace(first, out=tmp_path / "full"), progress=False)
    with pytest.raises(UserError, match="holds no parts to join"):
        join(tmp_path / "full")


def test_the_share_slurm_gives(monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(UserError, match="SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT, which are not set"):
        part_from_environment()
    for number, count, first, step, expected in [(0, 4, 0, 1, 0), (4, 4, 1, 1, 3), (6, 3, 2, 2, 2)]:
        for name, value in {"ID": number, "COUNT": count, "MIN": first, "STEP": step}.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
        assert part_from_environment() == Part(expected, count)
    for wrong in (Part(3, 3), Part(-1, 3), Part(0, 0)):
        with pytest.raises(UserError, match="array index"):
            PrepareOptions(("stdlib",), "x", part=wrong).check()


def test_tasks_at_the_same_time_as_a_user_starts_them(options, tmp_path):
    """Processes with SLURM's variables, together, then join; and what the command line refuses."""
    command = [sys.executable, "-m", "megatron_bit", "prepare"]
    inputs = [*options.inputs, "--vocab-size", "400", "--shard-tokens", "4000", "--workers", "1"]
    running = []
    for index in range(3):
        variables = {"SLURM_ARRAY_TASK_ID": str(index + 1), "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}
        arguments = [*command, *inputs, "--array", "--out", str(options.out)]
        running.append(
            subprocess.Popen(
                arguments, env=os.environ | variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    outputs = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    assert "part 2 of 3: " in outputs[2][0] and "--join --out" in outputs[2][0]
    joined = subprocess.run([*command, "--join", "--out", str(options.out)], capture_output=True, text=True)
    assert joined.returncode == 0 and "left out: 1 binary file, 1 empty" in joined.stdout, joined
    one = prepare(
        PrepareOptions(options.inputs, tmp_path / "one", vocab_size=400, shard_tokens=4000, workers=1), progress=False
    )
    assert documents(load_manifest(options.out)) == documents(one)
    files = {path.name for path in options.out.iterdir() if path.suffix not in (".tar", ".npy")}
    assert files == {"manifest.json", "array.json", "tokenizer.model", *(f"part-000{i}-of-0003.json" for i in range(3))}
    assert json.loads((options.out / "array.json").read_text())["identity"]["parts"] == 3
    assert io.StringIO(joined.stderr).readlines()[-1].endswith("from 3 parts\n")
