"""`log.to`: what the real clients of Weights & Biases and MLflow have when a run has crashed and gone on."""

from __future__ import annotations

import json
import shutil
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from as_user import run

from megatron_bit.config import LogConfig, config_from_dict, load_config
from megatron_bit.errors import UserError
from megatron_bit.training.trackers import build
from megatron_bit.training.trackers.tracker import About, Background, Sent, shareable

SETTINGS = ("checkpoint.every=2", "log.every=1", "evaluate.every=2", "evaluate.samples=2", "evaluate.initial=false")


def _crash_and_go_on(folder: Path, train_args: Any, settings: tuple[str, ...], **env: str) -> list[dict[str, Any]]:
    """Steps 1 to 4, of which 3 and 4 are lost, and then 3 to 6; the records of log.jsonl."""
    first = run(*train_args(folder, "train.steps=6", "train.stop_at=4", *SETTINGS, *settings), **env)
    assert first.code == 0, first.err
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    second = run("train", str(folder), "train.stop_at=null", **env)
    assert second.code == 0, second.err
    assert "at step 2" in second.out and "warning" not in first.out + second.out
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    return records


def _offline(file: Path) -> Iterator[bytes]:
    """Records of a .wandb file: 7 bytes, then LevelDB's log format (blocks of 32 KiB; checksum, length, and whether a
    part is a whole record, its first, a middle or the last)."""
    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into what is left of the block
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def test_wandb_has_each_step_once(train_args: Any, tmp_path: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    folder = tmp_path / "a run"
    env = {"WANDB_MODE": "offline", "WANDB_PROJECT": "mine"}
    records = _crash_and_go_on(folder, train_args, ("log.to=[wandb]",), **env)
    own_id = json.loads((folder / "identity.json").read_text())["run id"]
    history: list[dict[str, Any]] = []
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.stem for file in files] == [f"run-{own_id}"] * 2  # one run there
    for file in files:
        for data in _offline(file):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                history.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
            if record.WhichOneof("record_type") == "run":
                assert (record.run.project, record.run.run_id, record.run.display_name) == ("mine", own_id, "a run")
                config = {u.key: json.loads(u.value_json) for u in record.run.config.update}
                assert config["model"]["block_size"] == 3
    steps = [row for row in history if "train/loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [(row["tokens"], row["train/loss"]) for row in steps] == [(r["tokens"], r["loss"]) for r in records]
    assert all(row["train/memory_gib"] > 0 for row in steps)
    found = [(row["step"], row["validation/nats_per_token"]) for row in history if "validation/nats_per_token" in row]
    lines = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert found == [(line["step"], line["nats_per_token_bound"]) for line in lines] and len(found) == 3
    shares = [row for row in history if "validation/nats_per_token" in row]
    for kind in ("place", "group"):
        whole = [line[f"nats_by_{kind}"] for line in lines]
        assert [
            [row[f"validation/{kind}_{i}"] for i in range(len(v))] for row, v in zip(shares, whole, strict=True)
        ] == whole
        assert f"validation/{kind}_{len(whole[0])}" not in shares[0]


def test_mlflow_has_each_step_once(train_args: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    env = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_TRACKING_URI": f"file://{tmp_path}/store"}
    records = _crash_and_go_on(tmp_path / "run", train_args, ("log.to=[mlflow]",), MLFLOW_EXPERIMENT_NAME="mine", **env)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    client = MlflowClient()
    (there,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])  # pyright: ignore
    assert (there.info.run_name, there.info.status) == ("run", "FINISHED")
    assert there.data.params["model.block_size"] == "3"
    history = client.get_metric_history(there.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(r["step"], r["loss"]) for r in records]
    history = client.get_metric_history(there.info.run_id, "validation/nats_per_token")
    assert [m.step for m in history] == [2, 4, 6]


def test_a_server_that_is_away_ends_nothing(train_args: Any, tmp_path: Path) -> None:
    """Said once; tensorboard, which stands beside it, has everything."""
    env = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = run(*train_args(tmp_path / "run", "log.to=[tensorboard,mlflow]", "log.every=1"), **env)
    assert done.code == 0, done.err
    assert done.out.count("warning: mlflow cannot be written") == 1 and "going on without" in done.out
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_what_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    about = About(tmp_path, "0" * 16, {}, 0, 0)
    with pytest.raises(
        UserError, match=r"log.to names wandb, which is not installed: pip install 'megatron-bit\[wandb\]'"
    ):
        build.Trackers().open(LogConfig(to=("wandb",)), about)


class _Slow:
    def __init__(self, seconds: float) -> None:
        self.seconds, self.got = seconds, list[int]()

    def scalars(self, group: str, step: int, tokens: int, values: Mapping[str, float]) -> None:
        time.sleep(self.seconds)
        if step == 7:
            raise ConnectionError("gone")
        self.got.append(step)

    def flush(self) -> None: ...

    def close(self, finished: bool) -> None: ...


def test_a_slow_server_is_not_waited_for_and_a_lost_one_is_said() -> None:
    slow = _Slow(0.4)
    tracker = Background("slow", lambda: slow)
    begin = time.monotonic()
    for step in range(5):
        tracker.scalars("train", step, 0, {})
    assert time.monotonic() - begin < 0.4 * 5
    tracker.close(True)
    assert slow.got == [0, 1, 2, 3, 4] and not tracker.problem  # in their order, all of them
    lost = Background("lost", lambda: _Slow(0.0))
    lost.scalars("train", 7, 0, {})
    lost.close(True)
    assert lost.problem == "ConnectionError: gone"


def test_what_was_sent_is_known_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text('{"other": {"id": "x"}, "broken": 3}')
    sent = Sent(tmp_path, "wandb")
    assert sent.id is None
    sent.named("abc")
    assert [sent.is_new("train", step) for step in (1, 2, 2, 1, 3)] == [True, True, False, False, True]
    assert sent.is_new("validation", 0)  # the untrained model
    sent.flush()
    again = Sent(tmp_path, "wandb")
    assert again.id == "abc" and not again.is_new("train", 3) and again.is_new("train", 4)
    assert json.loads((tmp_path / "trackers.json").read_text())["other"] == {"id": "x"}
    for damaged in ("", "[]", "{" * 9999, '{"wandb": {"train": "x", "id": 3}}'):
        (tmp_path / "trackers.json").write_text(damaged)
        assert Sent(tmp_path, "wandb").id is None and Sent(tmp_path, "wandb").is_new("train", 0)


def test_trackers_of_two_threads_do_not_forget_each_others_steps(tmp_path: Path) -> None:
    def send(name: str) -> None:
        sent = Sent(tmp_path, name)
        for step in range(300):
            sent.is_new("train", step)
            sent.flush()

    threads = [threading.Thread(target=send, args=(name,)) for name in ("wandb", "mlflow")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": {"train": 299}, "mlflow": {"train": 299}}


def test_no_secret_leaves_with_the_configuration() -> None:
    pairs = ["data.sources=[{path: 'https://me:secret@host/d?token=secret'}, {path: 'pipe:curl -H secret {file}'}]"]
    config = load_config(overrides=[*pairs, "checkpoint.mirror=s3://bucket/run", "run=a"])
    shown = shareable(config.model_dump(mode="json"))
    assert [source["path"] for source in shown["data"]["sources"]] == ["https://host/d", "pipe: a command"]
    assert shown["checkpoint"]["mirror"] == "s3://bucket/run" and shown["run"] == "a"
    assert "secret" not in json.dumps(shown)


def test_configurations_of_before() -> None:
    assert load_config(overrides=["log.tensorboard=false"]).log.to == ()
    assert load_config(overrides=["log.tensorboard=true"]).log.to == ("tensorboard",)
    assert config_from_dict({"log": {"tensorboard": False, "every": 3}}).log == LogConfig(to=(), every=3)
    assert load_config(overrides=["log.tensorboard=false", "log.to=[wandb]"]).log.to == ("wandb",)
