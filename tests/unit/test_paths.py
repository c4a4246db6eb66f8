"""Paths as users write them."""

import os
import pwd
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bit.errors import UserError
from megatron_bit.paths import user_path


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
