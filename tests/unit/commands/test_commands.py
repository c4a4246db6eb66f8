"""The words in front of a command's own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_bit import __version__


def _run(*words: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-P", "-m", "megatron_bit", *words], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_version() -> None:
    assert _run("--version") == (0, f"megatron-bit {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "megatron-bit has no command 'trian'; did you mean train?"),
        (["data", "insepct", "x"], "megatron-bit data has no command 'insepct'; did you mean inspect?"),
        (["bench", "qualty"], "megatron-bit bench has no command 'qualty'; did you mean quality?"),
        (["xyzzy"], "megatron-bit has no command 'xyzzy'; `megatron-bit --help` says what there is"),
    ],
)
def test_a_mistyped_command(words: list[str], said: str) -> None:
    assert _run(*words) == (2, "", f"megatron-bit: error: {said}\n")
