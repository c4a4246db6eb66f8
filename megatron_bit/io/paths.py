"""Paths as users write them: `~` and `$VARIABLE` where no shell has expanded them, as in YAML, `key=value`, quotes."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_bit.errors import UserError
from megatron_bit.io import trust

LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, of Linux
_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")


def user_path(text: str | Path) -> Path:
    """The path that the user means: a leading `~` or `~name` and `$NAME` or `${NAME}` are expanded.

    What exists as it is written stays so: a file with such a name, and a folder with a `$` in the name together with
    all below it. Raises UserError: no such user, a variable that is not set or empty, an empty path, one with a NUL.
    """
    written = os.fspath(text)
    if not written or "\0" in written:
        raise UserError(f"path {written!r} is {'not a path: it has a NUL in it' if written else 'empty; name one'}")
    if os.path.lexists(written):
        return Path(written)
    first, slash, rest = written.partition("/")
    if first.startswith("~"):
        written = _home(first, written) + slash + rest
    found = ""
    for component in written.split("/"):
        literal = os.path.lexists(found + component)
        found += (component if literal else _VARIABLE.sub(lambda match: _value(match, text), component)) + "/"
    _check_length(found)
    return Path(found)


def _check_length(path: str) -> None:
    longest = max(len(os.fsencode(name)) for name in path.split("/"))
    if longest > LONGEST_NAME or len(os.fsencode(path)) > LONGEST_PATH:
        raise UserError(
            f"path {path[:60]!r}... is too long: a name in it may have {LONGEST_NAME} bytes, and all of it "
            f"{LONGEST_PATH}; choose a shorter one"
        )


def user_location(text: str) -> str:
    """The same of what may also be a URL, of which the variables alone are expanded, or a command (`pipe:`), which is
    left as it is: no shell runs it. "" stays. Raises UserError as `user_path` does."""
    if not trust.acts(text):
        return str(user_path(text)) if text else text
    if "://" in text and not text.startswith(trust.PIPE):
        text = _VARIABLE.sub(lambda match: _value(match, text), text)
    trust.say(text)
    return text


def _home(first: str, written: str) -> str:
    home = os.path.expanduser(first)
    if home == first or (first == "~" and os.environ.get("HOME") == ""):  # the latter gives /
        why = "HOME is empty" if first == "~" else f"there is no user {first[1:]!r}"
        raise UserError(f"path {written!r}: {why}; write ./{first} if it is the name of a file")
    return home


def _value(match: re.Match[str], text: str | Path) -> str:
    name = match[1] or match[2]
    value = os.environ.get(name, "")
    if not value:
        raise UserError(f"path {str(text)!r}: the variable {name} is not set or empty; set it, or write the path out")
    return value
