"""Paths as users write them."""

import os
import pwd
from pathlib import Path
from typing import Annotated

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st
from mbit_launcher.profile import load_profile

from megatron_bit import cli
from megatron_bit.commands.arguments import split
from megatron_bit.config import load_config
from megatron_bit.errors import UserError
from megatron_bit.io.paths import user_location, user_path
from megatron_bit.run.folder import resolve


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("NAME", "x$y~")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOT_SET", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "text, path",
    [
        ("~", "{home}"),
        ("~/a/b", "{home}/a/b"),
        (Path("~/a"), "{home}/a"),
        ("$SCRATCH/a", "/scratch/me/a"),
        ("${SCRATCH}/a", "/scratch/me/a"),
        ("runs/a-${NAME}.d", "runs/a-x$y~.d"),  # once: a value is a name, not a pattern
        ("~/$NAME", "{home}/x$y~"),
        ("a/~/b", "a/~/b"),
        ("a~", "a~"),
        ("./~", "~"),
        ("a$", "a$"),
        ("a$1/$-", "a$1/$-"),
        ("a/b", "a/b"),
        ("/", "/"),
        ("sweep/optim.lr=1e-3", "sweep/optim.lr=1e-3"),
    ],
)
def test_what_a_path_means(here, text, path):
    assert user_path(text) == Path(path.format(home=here / "home"))


def test_a_user_by_name():
    user = pwd.getpwuid(os.getuid())
    assert user_path(f"~{user.pw_name}/a") == Path(user.pw_dir, "a")


@pytest.mark.parametrize(
    "text, why",
    [
        ("~nobody_of_that_name/a", "no user 'nobody_of_that_name'; write ./~nobody_of_that_name"),
        ("$NOT_SET/a", r"'\$NOT_SET/a': the variable NOT_SET is not set or empty"),
        ("a/${EMPTY}/b", "the variable EMPTY is not set or empty"),
        ("", "empty"),
        ("a\0b", "NUL"),
    ],
)
def test_what_cannot_be_meant_is_one_line(text, why):
    with pytest.raises(UserError, match=why) as caught:
        user_path(text)
    assert "\n" not in str(caught.value)


def test_an_empty_home_is_not_the_root(monkeypatch):
    monkeypatch.setenv("HOME", "")
    with pytest.raises(UserError, match="HOME is empty"):
        user_path("~/a")


def test_what_exists_as_written_wins(here):
    for name in ("$SCRATCH", "~", "a$NOT_SET"):
        Path(name).write_text("")
        assert user_path(name) == Path(name)
    Path("d$NOT_SET").mkdir()
    assert user_path("d$NOT_SET/new/*.txt") == Path("d$NOT_SET/new/*.txt")
    assert user_path("d$NOT_SET/$SCRATCH") == Path("d$NOT_SET//scratch/me")
    assert user_path("~/a") == here / "home" / "a"  # a stray folder of that name is not meant
    Path("dangling~").symlink_to("nowhere")
    assert user_path("dangling~") == Path("dangling~")


@given(st.text(st.characters(blacklist_characters="~$\0", blacklist_categories=["Cs"]), min_size=1))
def test_other_names_stay(text):
    assert user_path(text) == Path(text)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", ""),
        ("pipe:cat $SCRATCH/{file}", "pipe:cat $SCRATCH/{file}"),  # a command is split into words, and run by no shell
        ("s3://bucket/$NAME/~", "s3://bucket/x$y~/~"),
        ("$SCRATCH/x", "/scratch/me/x"),
        ("runs/a=1", "runs/a=1"),
    ],
)
def test_what_may_be_a_url(text: str, place: str) -> None:
    assert user_location(text) == place


def test_the_paths_of_a_configuration(here: Path) -> None:
    """In a file and on the command line; not in what a folder holds that somebody else may have written."""
    (here / "c.yaml").write_text(
        "run: ~/runs\ndata: {sources: [{path: $SCRATCH/a}, {path: 's3://b/$NAME'}], remote: {cache: ~}}\n"
        "train: {init_from: $SCRATCH/w}\ncheckpoint: {mirror: 's3://b/$NAME/run'}\n"
    )
    config = load_config(here / "c.yaml", ["data.remote.cache=~/cache"])
    home = here / "home"
    assert (config.run, config.data.remote.cache) == (f"{home}/runs", f"{home}/cache")
    assert config.data.folders == ("/scratch/me/a", "s3://b/x$y~")
    assert (config.train.init_from, config.checkpoint.mirror) == ("/scratch/me/w", "s3://b/x$y~/run")
    with pytest.raises(
        UserError, match=r"^run = \$NOT_SET/x \(command line\): .* variable NOT_SET is not set or empty"
    ):
        load_config(None, ["run=$NOT_SET/x"])
    with pytest.raises(UserError, match=r"^data.path = ~nobody-here/x \(.*d.yaml\): .* there is no user 'nobody-here'"):
        (here / "d.yaml").write_text("data: {path: ~nobody-here/x}")
        load_config(here / "d.yaml")
    with pytest.raises(UserError, match=r"^run = r\udcff \(command line\): the name is no UTF-8; rename the folder"):
        load_config(None, ["run=r\udcff"])
    run = here / "cwd" / "$SCRATCH"
    run.mkdir()
    (run / "config.yaml").write_text("run: $NOT_SET\ndata: {path: ~/$NOT_SET}\n")
    again = resolve("$SCRATCH", (), None)  # it is there under this very name
    assert (again.run, again.data.path) == ("$SCRATCH", "~/$NOT_SET")
    with pytest.raises(UserError, match="--preset laptop has no use here"):
        resolve("$SCRATCH", (), "laptop")


def test_a_run_may_have_any_name(here: Path) -> None:
    for name in ("sweep/optim.lr=1e-3", "optim.lr=1e-3", "a=b"):
        (here / "cwd" / name).mkdir(parents=True)
        (here / "cwd" / name / "config.yaml").write_text("")
    (here / "cwd" / "train.steps=3").mkdir()  # no run
    (here / "c=1.yaml").write_text("")
    change = "train.steps=3"
    for target in ("sweep/optim.lr=1e-3", "optim.lr=1e-3", "./optim.lr=1e-3", "a=b", "sweep", f"{here}/c=1.yaml"):
        for words in ((target, change), (change, target)):
            assert split(words) == (str(Path(target)), (change,))
    assert split(("~/sweep", change)) == (f"{here}/home/sweep", (change,))
    assert split((change,)) == (None, (change,))
    assert split(("optim.lr=1e-3",), preset="laptop") == (None, ("optim.lr=1e-3",))
    assert split(("c.yaml", "optim.lr=1e-3")) == ("c.yaml", ("optim.lr=1e-3",))
    assert split(("no/such=1",)) == (None, ("no/such=1",))
    for two in (("c.yaml", "sweep"), ("c.yaml", "a=b"), ("a=b", "optim.lr=1e-3")):
        with pytest.raises(UserError, match=f"'{two[1]}' is neither key=value nor the one configuration"):
            split(two)


def test_every_command_takes_paths_as_users_write_them(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path | None] = []

    def command(run: Annotated[Path, tyro.conf.Positional], out: Path | None = None) -> int:
        seen.extend((run, out))
        return 0

    monkeypatch.setitem(cli.COMMANDS, "try", command)
    assert cli._dispatch(["try", "$SCRATCH/r", "--out=~/o"]) == 0
    assert seen == [Path("/scratch/me/r"), here / "home" / "o"]
    with pytest.raises(UserError, match="there is no user 'nobody-here'"):
        cli._dispatch(["try", "~nobody-here/x"])


def test_the_paths_of_a_cluster_profile(here: Path) -> None:
    (here / "p.yaml").write_text(
        "ranks_per_node: 1\npython: ~/venv/bin/python\ncordon: $SCRATCH/cordon\n"
        "container: {image: $SCRATCH/i.sqsh, mounts: ['$SCRATCH:/data', '~/x:/x']}\n"
    )
    profile = load_profile(here / "p.yaml")
    assert (profile.python, profile.cordon) == (f"{here}/home/venv/bin/python", "/scratch/me/cordon")
    assert profile.container is not None and profile.container.image == "/scratch/me/i.sqsh"
    assert profile.container.mounts == ("/scratch/me:/data", f"{here}/home/x:/x")
    with pytest.raises(UserError, match=r"^cluster.cordon = \$NOT_SET/x: .* is not set"):
        load_profile(here / "p.yaml", ["cordon=$NOT_SET/x"])


@pytest.mark.parametrize("text", ["a" * 256, "x/" * 2100, "\u00e9" * 128])
def test_a_path_that_is_too_long(text: str) -> None:
    """Python raises OSError at the first look at it."""
    with pytest.raises(UserError, match=r"is too long: a name in it may have 255 bytes, and all of it 4095"):
        user_path(text)
