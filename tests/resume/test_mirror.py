"""checkpoint.mirror: what is copied behind a URL is complete or invisible, and brings a run back."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import tiny_runs
from fsspec.implementations.local import LocalFileSystem
from gloo_ranks import run_ranks

from megatron_bit.checkpoint import mirror as module
from megatron_bit.checkpoint.mirror import Mirror
from megatron_bit.errors import UserError
from megatron_bit.run import checkpoints as folders
from megatron_bit.run.identity import compare_run

IDENTITY = {"train.seed": 5}


class Flaky(LocalFileSystem):
    """A local file system that fails as it is told."""

    protocol = "flaky"
    failures: ClassVar[list[str]] = []  # endings of paths whose next put fails
    written: ClassVar[list[str]] = []
    gate: threading.Event | None = None

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return LocalFileSystem._strip_protocol(str(path).removeprefix("flaky://"))

    def put_file(self, lpath: str, rpath: str, *args: Any, **more: Any) -> None:
        if self.gate is not None:
            assert self.gate.wait(30)
        for ending in list(self.failures):
            if rpath.endswith(ending):
                self.failures.remove(ending)
                Path(rpath).write_bytes(b"half")
                raise ConnectionError("the line is dead")
        shutil.copyfile(lpath, rpath)
        self.written.append(Path(rpath).name)


class Stalling(Flaky):
    """At the first put of a file with this ending it stands still, and something happens meanwhile."""

    protocol = "stalling"
    ending: ClassVar[str] = ""
    meanwhile: ClassVar[Any] = None

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return LocalFileSystem._strip_protocol(str(path).removeprefix("stalling://"))

    def put_file(self, lpath: str, rpath: str, *args: Any, **more: Any) -> None:
        if Stalling.meanwhile is not None and rpath.endswith(Stalling.ending):
            do, Stalling.meanwhile = Stalling.meanwhile, None
            do()
        super().put_file(lpath, rpath, *args, **more)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> type[Flaky]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setattr(Flaky, "failures", [])
    monkeypatch.setattr(Flaky, "written", [])
    monkeypatch.setattr(Flaky, "gate", None)
    return Flaky


def checkpoint(root: Path, step: int, text: str = "weights", identity: dict[str, Any] = IDENTITY) -> Path:
    final = folders.step_folder(root, step)
    temporary = final.with_suffix(folders.TEMPORARY)
    temporary.mkdir(parents=True)
    entry = folders._write(temporary / "rank-00000.safetensors", f"{text} {step}")
    folders.commit(temporary, final, {}, {"rank-00000.safetensors": entry}, {
        "identity": identity, "step": step, "state": {"step": step, "samples": 0, "tokens": 0}, "updates": step,
        "layout": "", "config": {},
    })  # fmt: skip
    return final


def of_run(seed: int) -> Any:
    """What a start of a run of this seed asks of what it finds there."""
    return lambda meta, where: compare_run(meta["identity"], {"train.seed": seed}, where)


def opened(tmp_path: Path, keep: int = 2) -> Mirror:
    made = Mirror(f"flaky://{tmp_path}/there", keep, 4)
    made.open()
    return made


def test_copies_are_complete_or_invisible(tmp_path: Path, flaky: type[Flaky]) -> None:
    mirror, here = opened(tmp_path), tmp_path / "here"
    flaky.failures = ["rank-00000.safetensors", "COMMITTED", "COMMITTED"]
    mirror.put(checkpoint(here, 1))
    mirror.finish(30)
    assert flaky.written[-1] == "COMMITTED" and flaky.written.count("COMMITTED") == 1
    assert folders.problems(tmp_path / "there" / "step-00000001") == []
    (line,) = mirror.news()
    assert line.startswith(f"copied step-00000001 to flaky://{tmp_path}/there: ")

    flaky.failures = ["meta.json"] * module.ATTEMPTS
    mirror.put(checkpoint(here, 2))
    with pytest.raises(UserError, match=r"step-00000002 is not copied to checkpoint.mirror .*: the line is dead"):
        mirror.finish(30)
    assert mirror.complete() == ["step-00000001"]
    assert "training goes on" in mirror.news()[0]

    for step in range(3, 8):  # the next ones succeed, and older ones go: but for multiples of 4
        mirror.put(checkpoint(here, step))
        mirror.finish(30)
    assert mirror.complete() == ["step-00000004", "step-00000006", "step-00000007"]
    assert not (tmp_path / "there" / "step-00000001").exists()


def test_a_step_saved_again_replaces_its_copy(tmp_path: Path, flaky: type[Flaky]) -> None:
    """While it is replaced there is no mark beside files of two saves."""
    mirror, here = opened(tmp_path), tmp_path / "here"
    mirror.put(checkpoint(here, 3))
    mirror.finish(30)
    flaky.failures = ["rank-00000.safetensors"] * module.ATTEMPTS
    mirror.put(checkpoint(here, 3, "others"))
    with pytest.raises(UserError):
        mirror.finish(30)
    assert mirror.complete() == []
    mirror.put(here / "step-00000003")
    mirror.finish(30)
    assert (tmp_path / "there/step-00000003/rank-00000.safetensors").read_text() == "others 3"


def test_what_is_being_copied_is_needed(tmp_path: Path, flaky: type[Flaky]) -> None:
    mirror, here = opened(tmp_path), tmp_path / "here"
    flaky.gate = threading.Event()
    for step in (1, 2, 3):
        mirror.put(checkpoint(here, step))
    with pytest.raises(UserError, match="has not ended in 0 s"):
        mirror.finish(0.05)
    needed = {folder.name for folder in mirror.needed}
    assert "step-00000003" in needed and len(needed) <= 2
    folders.prune(here, 1, 0, mirror.needed)
    assert {folder.name for folder in folders.complete(here)} == needed
    flaky.gate.set()
    mirror.finish(30)
    assert mirror.complete()[-1] == "step-00000003" and mirror.needed == set()


def test_fetch(tmp_path: Path, flaky: type[Flaky]) -> None:
    mirror, here, fresh = opened(tmp_path), tmp_path / "here", tmp_path / "fresh"
    assert mirror.fetch_newer(fresh, of_run(5)) is None
    for step in (1, 2):
        mirror.put(checkpoint(here, step))
        mirror.finish(30)
    fresh.mkdir()
    line = mirror.fetch_newer(fresh, of_run(5))
    assert line is not None and "step-00000002" in line
    assert folders.problems(fresh / "step-00000002") == []
    assert mirror.fetch_newer(fresh, of_run(5)) is None, "it is there now"
    with pytest.raises(UserError, match=r"train.seed is 5 there and 6 here"):
        mirror.fetch_newer(fresh, of_run(6))
    mirror.catch_up(checkpoint(fresh, 3))
    mirror.finish(30)
    assert mirror.complete()[-1] == "step-00000003"

    file = tmp_path / "there" / "step-00000003" / "rank-00000.safetensors"
    file.write_text(file.read_text().swapcase())
    shutil.rmtree(fresh)
    fresh.mkdir()
    with pytest.raises(UserError, match=r"rank-00000.safetensors is damaged: SHA-256"):
        mirror.fetch_newer(fresh, of_run(5))
    assert list(fresh.iterdir()) == []
    hashes = tmp_path / "there" / "step-00000003" / "hashes.json"
    hashes.write_text(json.dumps({"../x": {"bytes": 1, "sha256": "0"}}))
    with pytest.raises(UserError, match=r"hashes.json is not what COMMITTED says"):
        mirror.fetch_newer(fresh, of_run(5))


def test_a_run_whose_folder_is_lost_goes_on_from_the_mirror(tiny_data: Path, tmp_path: Path) -> None:
    """On two ranks, to the bit."""
    mirror = {"checkpoint.mirror": f"file://{tmp_path}/store/run", "checkpoint.every": 2, "checkpoint.keep": 1}

    def train(run: str, **settings: Any) -> None:
        overrides = tiny_runs.overrides(tmp_path / run, tiny_data, {"parallel.zero_stage": 2, **settings})
        assert run_ranks(tiny_runs.train, 2, overrides) == [0, 0]

    train("whole")
    train("lost", **mirror, **{"train.stop_at": 3})
    assert [p.name for p in (tmp_path / "store" / "run").iterdir()] == ["step-00000003"]
    shutil.rmtree(tmp_path / "lost")
    train("lost", **mirror)
    whole, lost = tiny_runs.read(tmp_path / "whole"), tiny_runs.read(tmp_path / "lost")
    assert lost.loss == whole.loss[3:]
    assert tiny_runs.worst(lost.weights, whole.weights)[0] == 0.0
    assert folders.problems(tmp_path / "store" / "run" / "step-00000005") == []


def test_an_incomplete_checkpoint_is_fetched_whole(tiny_data: Path, tmp_path: Path) -> None:
    """It stands under the name of the one that is fetched (the kill test, seed 17000159)."""
    settings = {"checkpoint.mirror": f"file://{tmp_path}/store", "checkpoint.every": 1, "checkpoint.keep": 2}
    arguments = tiny_runs.overrides(tmp_path / "run", tiny_data, {**settings, "train.stop_at": 3})
    assert run_ranks(tiny_runs.train, 1, arguments) == [0]
    newest = tmp_path / "run" / "checkpoints" / "step-00000003"
    (newest / "COMMITTED").unlink()
    (newest / "rank-00000.safetensors").write_bytes(b"")
    said = tmp_path / "said"
    assert run_ranks(tiny_runs.aloud, 1, [*arguments, "train.stop_at=4"], said) == [0]
    assert "fetched" in said.read_text() and "at step 3" in said.read_text()
    assert folders.problems(newest) == [] and not list(newest.parent.glob("*.*"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nothing://x/y", r"checkpoint.mirror nothing://x/y cannot be opened: Protocol not known: nothing"),
        ("file:///proc/version/run", r"step-00000005 is not copied to checkpoint.mirror file:///proc/version/run"),
    ],
)
def test_a_mirror_that_is_none_is_said(url: str, said: str, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=said):
        run_ranks(tiny_runs.train, 2, tiny_runs.overrides(tmp_path / "run", tiny_data, {"checkpoint.mirror": url}))


def _opened(url: str) -> Mirror:
    mirror = Mirror(url, 3, 0)
    mirror.open()
    return mirror


@pytest.mark.parametrize("ending", ["weights", "hashes.json", "meta.json", "COMMITTED"])
def test_two_writers_one_of_which_stands_still(
    ending: str, flaky: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one stands still in the middle of a file the other copies its checkpoint of the same step whole. What is
    there then is a whole one of either, or none; and who has not put it there says so."""
    fsspec.register_implementation("stalling", Stalling, clobber=True)
    url = f"stalling://{tmp_path / 'there'}"
    ours = checkpoint(tmp_path / "ours", 4, "weights of the one")
    theirs = checkpoint(tmp_path / "theirs", 4, "weights of another")
    named = {path.name for path in ours.iterdir()}
    ending = next((name for name in sorted(named) if name.endswith(ending)), "") or sorted(named)[-1]
    other = _opened(url)
    monkeypatch.setattr(Stalling, "ending", ending)
    monkeypatch.setattr(Stalling, "meanwhile", lambda: (other.put(theirs), other.finish(20)))
    mirror = _opened(url)
    mirror.put(ours)
    with pytest.raises(UserError, match=r"another job has copied a checkpoint to .* at the same time"):
        mirror.finish(30)
    assert Stalling.meanwhile is None
    assert mirror.complete() == []
    other.put(theirs)
    other.finish(20)
    assert folders.problems(tmp_path / "there" / theirs.name) == []


def test_a_checkpoint_that_is_replaced_while_it_is_copied(
    flaky: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("stalling", Stalling, clobber=True)
    ours = checkpoint(tmp_path / "run", 4, "weights of the one")

    def replace() -> None:
        (tmp_path / "run").rename(tmp_path / "away")
        checkpoint(tmp_path / "run", 4, "weights of another")

    monkeypatch.setattr(Stalling, "ending", sorted(path.name for path in ours.iterdir() if path.name != "COMMITTED")[0])
    monkeypatch.setattr(Stalling, "meanwhile", replace)
    mirror = _opened(f"stalling://{tmp_path / 'there'}")
    mirror.put(ours)
    with pytest.raises(UserError, match="it was replaced while it was copied"):
        mirror.finish(30)
    assert mirror.complete() == []
    mirror.put(ours)
    mirror.finish(30)
    assert folders.problems(tmp_path / "there" / ours.name) == []
