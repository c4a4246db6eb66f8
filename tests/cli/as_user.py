"""The product as its user meets it: the installed command, in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
COMMAND = str(BIN / "megatron-bit")
TORCHRUN = (str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "megatron_bit")
_FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int | str
    out: str
    err: str

    def refused(self, *parts: str) -> str:
        """Assert that this is a user's mistake, said once and in one line that has all `parts`; returns the line."""
        assert self.code == 2, f"exit code {self.code}\n{self.err}"
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("megatron-bit: error:")]
        assert len(lines) == 1, self.err
        for part in parts:
            assert part in lines[0], f"{part!r} is not in: {lines[0]}"
        return lines[0]

    def refused_alone(self, *parts: str) -> str:
        """The same, and nothing else is on stderr."""
        line = self.refused(*parts)
        assert self.err == f"{line}\n"
        return line


def environment(**extra: str) -> dict[str, str]:
    base = {key: value for key, value in os.environ.items() if key not in _FOREIGN}
    return {**base, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TERM": "dumb", "COLUMNS": "200", **extra}


def run(*args: str, command: Sequence[str] = (COMMAND,), timeout: float = 90, **env: str) -> Outcome:
    """Run the command to its end."""
    done = subprocess.run(
        [*command, *args], env=environment(**env), capture_output=True, text=True, timeout=timeout, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


class Running:
    """A command under way, whose progress lines a test waits for."""

    def __init__(self, *args: str, command: Sequence[str] = (COMMAND,)) -> None:
        self.process = subprocess.Popen(
            [*command, *args],
            env=environment(PYTHONUNBUFFERED="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []

    def wait_for(self, beginning: str) -> str:
        """Read until a line begins like this."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith(beginning):
                return line
        raise AssertionError(f"ended with {self.process.wait()} before {beginning!r}:\n{''.join(self.lines)}")

    def end(self, timeout: float = 45) -> int:
        """Exit code; the rest of the output is in `lines`."""
        begin = time.monotonic()
        rest, _ = self.process.communicate(timeout=timeout)
        self.lines += rest.splitlines(keepends=True)
        self.seconds = time.monotonic() - begin
        return self.process.returncode

    def ranks(self) -> dict[int, int]:
        """Process id of every rank."""
        import psutil

        children = psutil.Process(self.process.pid).children()
        return {int(child.environ()["RANK"]): child.pid for child in children if "RANK" in child.environ()}
