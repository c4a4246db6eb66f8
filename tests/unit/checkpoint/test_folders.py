"""Which folders count as checkpoints, what is deleted, and files that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_bit.checkpoint import save
from megatron_bit.checkpoint.index import FORMAT
from megatron_bit.checkpoint.load import complete, read_meta
from megatron_bit.errors import UserError
from megatron_bit.run_folder import newest_checkpoint


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
    save.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "step-00000004", "step-00000005"]


def test_a_folder_being_deleted_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of a deletion: what is left is not to be loaded."""
    _make(tmp_path, "step-00000001")
    _make(tmp_path, "step-00000002")
    monkeypatch.setattr(save.shutil, "rmtree", lambda *args, **kwargs: None)
    save.prune(tmp_path, 1)
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
        (None, "no readable meta.json"),
        ("{", "no readable meta.json"),
        ("[]", "meta.json"),
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
    from megatron_bit.data.manifest import load_manifest
    from megatron_bit.run_folder import identity, open_run

    config = load_config(None, [f"run={tmp_path}"])
    (tmp_path / "identity.json").write_text(json.dumps(known))
    with pytest.raises(UserError, match=str(tmp_path)):
        open_run(config, identity(config, load_manifest(tiny_data), "code"))
