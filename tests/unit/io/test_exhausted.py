"""What counts as having run out of something, and what is said of it."""

from __future__ import annotations

import errno
import os
import socket

import numpy as np
import pytest
import torch

from megatron_bit.cli import _say
from megatron_bit.errors import Stopped, UserError
from megatron_bit.io.exhausted import DESCRIPTORS, MEMORY, THREADS, exhausted, resource_of


def _raised(action) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError


def _for(error: Exception, kind: type[Exception] = UserError) -> Exception:
    """A UserError that was raised for `error`, which is not shown."""

    def action() -> None:
        try:
            raise error
        except Exception:
            raise kind("shard x is damaged; copy it again") from None

    return _raised(action)


OUT = [
    (MEMORY, MemoryError()),
    (MEMORY, _raised(lambda: np.empty(1 << 50))),
    (MEMORY, _raised(lambda: torch.empty(1 << 50))),
    (MEMORY, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
    (MEMORY, OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))),
    (THREADS, RuntimeError("can't start new thread")),
    (THREADS, RuntimeError("Resource temporarily unavailable")),
    (DESCRIPTORS, OSError(errno.EMFILE, os.strerror(errno.EMFILE))),
    (DESCRIPTORS, RuntimeError("[enforce fail at gloo/transport/tcp/device.cc:186] rv != -1. Too many open files")),
]


@pytest.mark.parametrize(("what", "error"), OUT)
def test_it_is_known_directly_and_behind_another_error(what: str, error: Exception) -> None:
    assert resource_of(error) == resource_of(_for(error)) == resource_of(_for(_for(error))) == what
    line = str(exhausted(_for(error), 3, 4))
    assert line.startswith(f"rank 3 on {socket.gethostname()} of 4 ranks ran out of {what}: ") and "\n" not in line
    assert "shard" not in line  # it is not to blame


NOT_OUT = [
    UserError("too many"),
    OSError(errno.ENOSPC, "No space left on device"),
    BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),  # a socket that has nothing to read
    RuntimeError("[gloo/transport/tcp/pair.cc:144] recv: Resource temporarily unavailable"),
    RuntimeError("Connection closed by peer"),
    ValueError("out of memory"),
]


@pytest.mark.parametrize("error", NOT_OUT)
def test_what_is_something_else(error: Exception) -> None:
    assert resource_of(error) is None and exhausted(error) is None and exhausted(_for(error)) is None


def test_a_rank_that_has_heard_of_it_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert _say(Stopped("", 88), 0, True) == 88
    assert capsys.readouterr().err == ""
    out = exhausted(MemoryError(), 2, 4)
    assert out is not None and _say(out, 2, True) == 88
    assert capsys.readouterr().err.startswith("megatron-bit: error: rank 2 on ")


def test_a_command_without_ranks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_bit import cli

    def out(argv: list[str]) -> int:
        raise MemoryError

    monkeypatch.setattr(cli, "_dispatch", out)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 88
    assert capsys.readouterr().err.startswith(f"megatron-bit: error: this process on {socket.gethostname()} ran out of")
