"""A checkpoint from somebody else: every value is looked at before anything is done with it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_trees import changed

from megatron_bit.checkpoint.load import open_reader
from megatron_bit.errors import UserError
from megatron_bit.run import checkpoints as folders

BOX = {"file": "rank-00000.safetensors", "key": "a/param/0-0", "offset": [0, 0], "shape": [4, 3]}
INDEX: dict[str, Any] = {"a": {"shape": [4, 3], "states": {"param": [BOX]}}}

VALUES: dict[str, tuple[tuple[Any, ...], Any]] = {  # where in the index, and what stands there
    "a text for a number": (("a", "states", "param", 0, "offset"), "x"),
    "no list": (("a", "states", "param", 0, "shape"), 3),
    "half a row": (("a", "states", "param", 0, "shape"), [1.5, 3]),
    "true is no number": (("a", "shape"), [True, 3]),
    "a negative place": (("a", "states", "param", 0, "offset"), [-1, 0]),
    "behind the end": (("a", "states", "param", 0, "offset"), [1, 0]),
    "another number of axes": (("a", "states", "param", 0, "shape"), [12]),
    "no states": (("a", "states"), 7),
    "no shape": (("a",), {"states": {}}),
    "an absolute file": (("a", "states", "param", 0, "file"), "/etc/passwd"),
    "a file outside": (("a", "states", "param", 0, "file"), "../../secret.safetensors"),
    "a hidden file": (("a", "states", "param", 0, "file"), ".netrc"),
    "a NUL": (("a", "states", "param", 0, "file"), "a\0b"),
    "larger than any": (("a",), {"shape": [2**47, 2**47], "states": {}}),
    "beyond 64 bits": (("a", "shape"), [2**70, 3]),
    "a key more": (("a", "more"), 1),
    "a long key": (("a", "states", "param", 0, "key"), "x" * 10**6),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_an_index_that_mean_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps(changed(INDEX, *VALUES[name])))
    with pytest.raises(UserError, match=r"index.json is damaged: .*; take another checkpoint") as said:
        open_reader(tmp_path)
    assert "\n" not in str(said.value) and len(str(said.value)) < 600


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
PLACES = [
    ("a",), ("a", "shape"), ("a", "shape", 0), ("a", "states"), ("a", "states", "param"), ("a", "states", "param", 0),
    *(("a", "states", "param", 0, key) for key in BOX), ("a", "states", "param", 0, "offset", 1),
]  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(st.sampled_from(PLACES), JUNK)
def test_any_value_anywhere_is_read_or_refused(tmp_path: Path, where: tuple[Any, ...], value: Any) -> None:
    (tmp_path / "index.json").write_text(json.dumps(changed(INDEX, where, value)))
    try:
        open_reader(tmp_path)
    except UserError as error:
        assert "\n" not in str(error)


def test_the_file_has_to_hold_what_the_index_says(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from megatron_bit.checkpoint.index import Rectangle

    (tmp_path / "index.json").write_text(json.dumps(INDEX))
    save_file({"a/param/0-0": torch.zeros(2, 3)}, tmp_path / "rank-00000.safetensors")
    with pytest.raises(UserError, match=r"a/param/0-0 has shape \[2, 3\] there, and \[4, 3\] in the index"):
        open_reader(tmp_path).read("a", "param", Rectangle((0, 0), (4, 3)))


@pytest.mark.parametrize(
    "files",
    [{"../x": {"sha256": "0" * 64, "bytes": 1}}, {"x": {"sha256": "/etc/passwd", "bytes": 1}}, {"x": {"bytes": 1}}, []],
)
def test_hashes_of_something_else(files: Any, tmp_path: Path) -> None:
    text = json.dumps(files).encode()
    (tmp_path / "hashes.json").write_bytes(text)
    (tmp_path / "COMMITTED").write_text(hashlib.sha256(text).hexdigest())
    (line,) = folders.problems(tmp_path)
    assert "hashes.json is damaged" in line
