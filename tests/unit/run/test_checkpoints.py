"""Which folders count as checkpoints, what is deleted, and files that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_bit.errors import UserError
from megatron_bit.run import checkpoints as folders
from megatron_bit.run.checkpoints import FORMAT, complete, read_meta
from megatron_bit.run.folder import newest_checkpoint


def _make(root: Path, name: str, committed: bool = True) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "data").write_text("x")
    if committed:
        (folder / "COMMITTED").touch()
    return folder


def test_complete_are_the_committed_ones_in_order(tmp_path: Path) -> None:
    _make(tmp_path, "step-00000010")
    _make(tmp_path, "step-00000009")
    _make(tmp_path, "step-00000011", committed=False)
    _make(tmp_path, "step-00000012.tmp")
    assert [p.name for p in complete(tmp_path)] == ["step-00000009", "step-00000010"]
    assert complete(tmp_path / "nothing") == []


def test_prune_keeps_the_newest_and_what_is_no_checkpoint(tmp_path: Path) -> None:
    for step in range(1, 6):
        _make(tmp_path, f"step-{step:08d}")
    _make(tmp_path, "mine")
    folders.prune(tmp_path, 2, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "step-00000004", "step-00000005"]


def test_a_folder_being_deleted_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of a deletion: what is left is not to be loaded."""
    _make(tmp_path, "step-00000001")
    _make(tmp_path, "step-00000002")
    monkeypatch.setattr(folders.shutil, "rmtree", lambda *args, **kwargs: None)
    folders.prune(tmp_path, 1, 0)
    assert [p.name for p in complete(tmp_path)] == ["step-00000002"]


def test_newest_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete checkpoint"):
        newest_checkpoint(tmp_path)
    _make(tmp_path / "checkpoints", "step-00000001")
    newest = _make(tmp_path / "checkpoints", "step-00000002")
    assert newest_checkpoint(tmp_path) == newest
    assert newest_checkpoint(newest) == newest


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "meta.json cannot be read: No such file"),
        ("{", "meta.json is no valid JSON"),
        ("[]", "meta.json is damaged"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "meta.json is no valid JSON: recursion limit exceeded"),
        (json.dumps({"format": FORMAT, "step": float("nan")}), r"meta.json is damaged: step = nan"),
        (json.dumps({"format": FORMAT, "step": "3"}), r"meta.json is damaged: step = '3'"),
        (json.dumps({"format": FORMAT + 1}), f"has format {FORMAT + 1}; this version reads {FORMAT}"),
    ],
)
def test_bad_meta(text: str | None, match: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "meta.json").write_text(text)
    with pytest.raises(UserError, match=match):
        read_meta(tmp_path)


@pytest.mark.parametrize("known", [[], {"model": 3}, {"model": {"bits": 3}}, {}])
def test_an_identity_of_something_else(known: Any, tiny_data: Path, tmp_path: Path) -> None:
    from megatron_bit.config import load_config
    from megatron_bit.data.corpus import Corpus
    from megatron_bit.data.manifest import load_manifest
    from megatron_bit.run.folder import claim
    from megatron_bit.run.identity import identity
    from megatron_bit.run.lock import RunLock

    config = load_config(None, [f"run={tmp_path}"])
    (tmp_path / "identity.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match=str(tmp_path)):
        claim(config, identity(config, Corpus.of(load_manifest(tiny_data)), "code"), RunLock(tmp_path))


def test_other_data_or_another_packing_is_another_run(tiny_data: Path, tmp_path: Path) -> None:
    """Both hashes are printed whole; a run from before a key existed has its default."""
    from megatron_bit.config import load_config
    from megatron_bit.data.corpus import Corpus
    from megatron_bit.data.manifest import load_manifest
    from megatron_bit.run.identity import compare_run, identity, of_folder

    corpus, config = Corpus.of(load_manifest(tiny_data)), load_config(None, [f"run={tmp_path}"])
    here = identity(config, corpus, "code")
    there = {**here, "data": "ab" * 32}
    with pytest.raises(UserError, match=rf"data is {'ab' * 32} there and {corpus.fingerprint} here"):
        compare_run(there, here, "run")
    old = {key: value for key, value in here.items() if key not in ("data.align_blocks", "data.document_boundaries")}
    compare_run(of_folder(old, here, "run"), here, "run")
    aligned = identity(load_config(None, ["data.align_blocks=true"]), corpus, "code")
    for there, mine in ((old, aligned), (aligned, here)):
        with pytest.raises(UserError, match=r"data\.align_blocks is (True|False) there and (True|False) here"):
            compare_run(of_folder(there, mine, "run"), mine, "run")


def test_prune_keeps_every_nth_and_the_untrained_one(tmp_path: Path) -> None:
    for step in (0, 10, 20, 30, 40, 50):
        _make(tmp_path, f"step-{step:08d}")
    folders.prune(tmp_path, 1, 20)
    assert [folders.step_of(p.name) for p in complete(tmp_path)] == [0, 20, 40, 50]


def test_sweep_puts_back_what_was_being_replaced_and_removes_the_rest(tmp_path: Path) -> None:
    _make(tmp_path, "step-00000001.replaced")  # killed between the two renames
    _make(tmp_path, "step-00000002")
    _make(tmp_path, "step-00000002.replaced")  # killed after them
    _make(tmp_path, "step-00000003.tmp")
    _make(tmp_path, "step-00000004.deleted")
    said = list(folders.sweep(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert len(said) == 4 and "put back" in said[0]
    assert list(folders.sweep(tmp_path)) == []


def test_copies_beside_checkpoints_are_left_alone(tmp_path: Path) -> None:
    """Whatever they are called: not listed, not pruned, not swept, and no error."""
    copies = ("step-00000001-good", "step-1", "step-000000001", "step-00000001.good", "step-00000009 (copy)",
              "step-٠٠٠٠٠٠٠١", "step-00000002-good.tmp", "step-00000001.good.deleted", "best")  # fmt: skip
    for name in (*copies, "step-00000001", "step-00000002", "step-00000003"):
        _make(tmp_path, name)
    assert list(folders.sweep(tmp_path)) == []
    folders.prune(tmp_path, 1, 0)
    assert [p.name for p in complete(tmp_path)] == ["step-00000003"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted((*copies, "step-00000003"))


def test_the_newest_is_the_largest_number(tmp_path: Path) -> None:
    """As text 100,000,000 is before 99,999,999."""
    for step in (99_999_999, 100_000_000, 7, 1_000_000_000):
        _make(tmp_path, folders.step_folder(tmp_path, step).name)
    assert [folders.step_of(p.name) for p in complete(tmp_path)] == [7, 99_999_999, 100_000_000, 1_000_000_000]
    assert folders.newest_step(tmp_path) == 1_000_000_000
    folders.prune(tmp_path, 2, 0)
    assert [folders.step_of(p.name) for p in complete(tmp_path)] == [100_000_000, 1_000_000_000]
    assert folders.newest_step(tmp_path / "nothing") == 0


@pytest.mark.parametrize("step", [0, 1, 99_999_999, 100_000_000, 10**17])
def test_a_name_is_read_back(step: int, tmp_path: Path) -> None:
    assert folders.step_of(folders.step_folder(tmp_path, step).name) == step


def test_room_is_asked_for_before_writing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"MiB free, and a checkpoint takes 1,000,000,000,000.0 MiB"):
        folders.fresh(tmp_path / "step-00000001.tmp", 10**12 * 2**20)
    assert list(tmp_path.iterdir()) == []
