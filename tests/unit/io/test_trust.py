"""A command or a URL is the user's own word, and not that of a file."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from megatron_bit.config import load_config
from megatron_bit.errors import UserError
from megatron_bit.io import trust
from megatron_bit.run.folder import data_of, resolve

PIPE = "pipe:sh -c 'touch ran' {file}"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another process of another user."""
    monkeypatch.setattr(trust, "_said", set())
    monkeypatch.setattr(trust, "_doubted", {})
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def _run(tmp_path: Path, **data: str) -> Path:
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    mirror = data.pop("mirror", "")
    (run / "config.yaml").write_text(f"data: {data}\ncheckpoint: {{mirror: '{mirror}'}}\n")
    return run


@pytest.mark.parametrize("location", [PIPE, "https://example.org/data", "s3://bucket/data", "file:///data"])
def test_what_a_run_names(location: str, tmp_path: Path) -> None:
    run = _run(tmp_path, path=location)
    resolve(str(run), (), None)
    with pytest.raises(UserError, match=r"run/config.yaml wants .* taken from you alone; .* say data.path=") as said:
        trust.check()
    assert str(said.value).endswith(f"data.path={shlex.quote(location)}")
    resolve(str(run), (f"data.path={location}",), None)  # on the command line
    trust.check()


def test_the_mirror_too(tmp_path: Path) -> None:
    resolve(str(_run(tmp_path, path="data", mirror="s3://bucket/run")), (), None)
    with pytest.raises(UserError, match=r"wants 's3://bucket/run'.* say checkpoint.mirror=s3://bucket/run"):
        trust.check()


def test_a_file_that_the_user_names_is_theirs(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f'data: {{path: "{PIPE}"}}\n')
    resolve(str(tmp_path / "c.yaml"), (), None)
    trust.check()


def test_what_was_said_before_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, [f"data.path={PIPE}"])
    trust.remember(*filter(trust.acts, config.data.folders))
    monkeypatch.setattr(trust, "_said", set())  # another process
    assert data_of(config, "meta.json") == PIPE
    changed = PIPE.replace("ran", "ran2")
    with pytest.raises(UserError, match=r"wants .*ran2.* which is a command"):
        data_of(config.model_copy(update={"data": config.data.model_copy(update={"path": changed})}), "meta.json")


def test_without_a_home_nothing_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for state in ("relative", str(tmp_path / "file" / "below")):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_STATE_HOME", state)
        trust.remember(PIPE)
        assert not trust.known(PIPE)
    trust.accept(PIPE)  # rank 0 has found it to be the user's
    assert trust.known(PIPE)


def test_a_folder_is_no_command(tmp_path: Path) -> None:
    resolve(str(_run(tmp_path, path="/somewhere/else")), (), None)
    trust.check()
