"""Which rank of an attempt failed first, and what it said. The others end because it did, and say that instead."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

TAIL_BYTES = 256 * 1024  # of a log: a traceback is at its end
# how cli.py and the interpreter begin what they say of an own failure
_OWN = re.compile(
    r"^(megatron-bit: error: .*|Traceback \(most recent call last\):|Fatal Python error: .*)$", re.MULTILINE
)
_FOLLOWS = re.compile(r"^(\[rank \d+\] stopped: |.*(Connection closed by peer|Connection reset by peer))", re.MULTILINE)


@dataclass(frozen=True)
class Failure:
    rank: int
    node: str
    text: str  # from the first line of the error to the end of the log

    @property
    def last_line(self) -> str:
        """Of a traceback the last line, which names the exception; of an error its one line."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        if lines[0].startswith(("megatron-bit: error:", "Fatal Python error:")):
            return lines[0].removeprefix("megatron-bit: error: ")
        # the lines of a traceback are indented, the exception is not
        return next(
            (line for line in lines[1:] if not line.startswith((" ", "Traceback", "The above", "During"))), lines[-1]
        )

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node}: {self.last_line}"


def rank_logs(folder: Path) -> list[tuple[int, str, Path]]:
    """(rank, node, file) of every rank's log in an attempt's folder, by rank."""
    found = []
    for path in folder.glob("rank-*.log"):
        number, _, node = path.name.removeprefix("rank-").removesuffix(".log").partition(".")
        if number.isdigit():
            found.append((int(number), node, path))
    return sorted(found)


def first_failure(folder: Path) -> Failure | None:
    """The rank whose own error was written first, by the time of its log's last write; None if none has said one."""
    found = []
    for rank, node, path in rank_logs(folder):
        try:
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - TAIL_BYTES))
                text = file.read().decode(errors="replace")
            written = path.stat().st_mtime_ns
        except OSError:
            continue
        own = _OWN.search(text)
        if own is not None:
            said = text[own.start() :]
            found.append((bool(_FOLLOWS.search(said)), written, Failure(rank, node, said)))
    return min(found, key=lambda item: item[:2])[2] if found else None
