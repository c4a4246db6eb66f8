"""Commands and URLs are taken from the user, not from a file that somebody else may have made.

A run, a checkpoint or a submission names its data, its mirror and its cluster profile. What is behind such a name is
run or fetched only if this user has said it: on this command line, in the configuration file that it names, or at a
start of before, whose words are remembered in the user's own state folder, as ssh remembers hosts. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
from pathlib import Path

from megatron_bit.errors import UserError

PIPE = "pipe:"  # begins the name of a data folder that a command reads
_said: set[str] = set()  # in this process
_doubted: dict[str, tuple[str, str]] = {}  # location: where it stands, and what to say instead


def acts(location: str) -> bool:
    """Whether to read there is to run a command, or to ask another machine."""
    return location.startswith(PIPE) or "://" in location


def say(words: str) -> None:
    """The user has said it, in this command or in a file that it names."""
    _said.add(words)


def doubt(location: str, where: str, instead: str) -> None:
    """It stands in an artefact. `check` refuses it if the user has not said it; what only names a file is let pass.

    Args:
        where: the file that it stands in.
        instead: how the user says it, with `{}` for the location.
    """
    if acts(location):
        _doubted[location] = (where, instead)


def check() -> None:
    """UserError for the first doubted location that the user has not said, now or before."""
    for location, (where, instead) in _doubted.items():
        if not known(location):
            raise UserError(
                f"{where} wants {location!r}, which is {_kind(location)}, and those are taken from you alone; if you "
                f"mean it, say {instead.replace('{}', shlex.quote(location))}"
            )


def accept(*locations: str) -> None:
    """Another rank has found these to be the user's: its home may be on a node that this one does not see."""
    _said.update(locations)


def known(words: str) -> bool:
    """Whether the user has said it in this process, or a start of theirs has remembered it."""
    if words in _said:
        return True
    with contextlib.suppress(OSError):
        return (_folder() / _name(words)).is_file()
    return False


def remember(*words: str) -> None:
    """For later commands. Where the state folder cannot be written, they are to be said again."""
    with contextlib.suppress(OSError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for one in words:
            (folder / _name(one)).touch(mode=0o600)


def _folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    if not os.path.isabs(state):
        raise OSError("no home")
    return Path(state) / "megatron_bit" / "said"


def _name(words: str) -> str:
    return hashlib.sha256(words.encode("utf-8", "surrogateescape")).hexdigest()


def _kind(location: str) -> str:
    return "a command" if location.startswith(PIPE) else "the address of another machine"
