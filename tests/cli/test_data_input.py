"""`prepare`, `data` and `train` on inputs and folders that are not what they seem, as a user types it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from as_user import COMMAND, environment, run

from megatron_bit.data.manifest import load_manifest


@pytest.fixture
def prepare(tiny_data: Path, tmp_path: Path) -> Any:
    def start(*inputs: str, out: str = "out", **env: str) -> Any:
        options = ["--tokenizer", str(tiny_data / "tokenizer.model"), "--validation-fraction", "0", "--workers", "1"]
        return run("prepare", *inputs, "--out", str(tmp_path / out), *options, **env)

    return start


def test_a_folder_with_all_kinds_of_things(prepare: Any, tmp_path: Path) -> None:
    for folder in ("in/a", "out_of_it"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            (tmp_path / folder / f"{i}.txt").write_text(f"document {i} in {folder}")
    (tmp_path / "in" / "linked").symlink_to("../out_of_it")
    (tmp_path / "in" / "loop").symlink_to(".")
    (tmp_path / "in" / "nothing.txt").symlink_to("nowhere")
    for text, out in ((str(tmp_path / "in"), "out"), (f"{tmp_path}/in/**", "other")):
        outcome = prepare(text, out=out)
        assert outcome.code == 0, outcome.err
        assert f"left out: 1 dangling link ({tmp_path}/in/nothing.txt)" in outcome.err
        assert outcome.out.strip().endswith("left out: 1 dangling link")
        manifest = load_manifest(tmp_path / out)
        assert manifest.split("train").documents == 6 and manifest.dropped == {"dangling link": 1}
    assert manifest.fingerprint == load_manifest(tmp_path / "out").fingerprint


def test_forms_of_json_and_a_key_without_use(prepare: Any, tmp_path: Path) -> None:
    rows = [{"text": f"document {i}", "url": f"http://x/{i}"} for i in range(9)]
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "array.json").write_text(json.dumps(rows))
    (tmp_path / "a.txt").write_text("text")
    for name in ("lines", "array"):
        assert prepare(str(tmp_path / f"{name}.json"), out=name).code == 0
        assert load_manifest(tmp_path / name).split("train").documents == 9
    prepare(str(tmp_path / "lines.json"), "--text-key", "no_such_key").refused("line 1: no key 'no_such_key'")
    prepare(str(tmp_path / "a.txt"), "--text-key", "text").refused("text_key is 'text', and no input has records")


def test_a_pipe_and_a_path_that_no_shell_has_expanded(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(9)))
    script = f"""{COMMAND} prepare <(cat lines.jsonl) '$HERE/lines.jsonl' --out '~/out' \\
        --tokenizer '${{HERE}}/t.model' --validation-fraction 0 --workers 1"""
    shutil.copy(tiny_data / "tokenizer.model", tmp_path / "t.model")
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment(HOME=str(tmp_path / "home"), HERE=str(tmp_path)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert load_manifest(tmp_path / "home" / "out").split("train").documents == 18
    assert not (tmp_path / "~").exists()
    seen = run("data", "verify", "~/out", HOME=str(tmp_path / "home"))
    assert seen.code == 0 and str(tmp_path / "home" / "out") in seen.out


def test_a_flipped_bit_in_a_shard(train_args: Any, tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    for shard in load_manifest(data).split("train").shards:
        content = bytearray((data / shard.file).read_bytes())
        content[content.index(b"\x93NUMPY") + 128] ^= 1
        (data / shard.file).write_bytes(content)
    outcome = run(*train_args(tmp_path / "run", f"data.path={data}", "train.steps=2"))
    outcome.refused("is damaged; copy it again", "its SHA-256 is ", "the manifest says ", str(data))
    settings = [f"data.path={data}", "train.steps=2", "data.verify=never"]
    assert run(*train_args(tmp_path / "never", *settings)).code == 0
    shutil.copy(data / "manifest.json", data / "tokenizer.model")
    for words in (train_args(tmp_path / "other", *settings), ["data", "inspect", str(data)]):
        run(*words).refused(f"tokenizer {data}/tokenizer.model is not the one the manifest names")


@pytest.mark.skipif(os.getuid() != 0, reason="gives up root's right to read everything")
def test_an_unreadable_folder(prepare: Any, tiny_data: Path, tmp_path: Path) -> None:
    for name in ("a", "locked"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "x.txt").write_text("text")
    (tmp_path / "in" / "locked").chmod(0)
    drop = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", COMMAND)
    words = ["prepare", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--validation-fraction", "0"]
    words += ["--workers", "1", "--tokenizer", str(tiny_data / "tokenizer.model")]
    run(*words, command=drop).refused(f"input folder {tmp_path}/in/locked cannot be read: Permission denied")
    assert run(*words, "--on-error", "skip", command=drop).code == 0
    assert load_manifest(tmp_path / "out").dropped == {"unreadable folder": 1}
