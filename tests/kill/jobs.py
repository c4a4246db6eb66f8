"""Jobs of the real trainer that can be watched and struck from outside."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from multiprocessing.connection import wait
from pathlib import Path

from gloo_ranks import fork_server
from kill import ranks
from mbit_launcher.local import choose_port


class Job:
    """A process for each rank. `until` waits for a moment of one of them; the striking is done by the caller."""

    def __init__(self, world_size: int, arguments: list[str], output: Path) -> None:
        """output: folder of the ranks' output, new for each job."""
        output.mkdir(parents=True)
        self.output, self.begin = output, time.monotonic()
        context, port = fork_server(), choose_port()
        self._pipes, self._processes, self._heard = [], [], ["" for _ in range(world_size)]
        self.moments: list[list[tuple[float, str]]] = [[] for _ in range(world_size)]  # (when, "+step")
        for rank in range(world_size):
            reader, pipe = context.Pipe(duplex=False)
            where = str(output / f"rank-{rank}")
            process = context.Process(target=ranks.main, args=(pipe, rank, world_size, port, arguments, where))
            process.start()
            pipe.close()
            os.set_blocking(reader.fileno(), False)
            self._pipes.append(reader)
            self._processes.append(process)

    # ---------------------------------------------------------------- watching
    def until(self, rank: int, moment: str, count: int, deadline: float) -> bool:
        """Wait for the `count`-th begin of a moment on a rank; whether it came before the rank ended."""
        wanted = f"+{moment}"
        while time.monotonic() < deadline:
            self._listen(0.05)
            if sum(said == wanted for _, said in self.moments[rank]) >= count:
                return True
            if self._processes[rank].exitcode is not None:
                return False
        return False

    def ended(self, deadline: float, every: bool = True) -> bool:
        """Wait for the end of every rank (or of any)."""
        how = all if every else any
        while not how(process.exitcode is not None for process in self._processes):
            if time.monotonic() > deadline:
                return False
            self._listen(0.05)
        self._listen(0.0)
        return True

    def alive(self) -> list[int]:
        return [rank for rank, process in enumerate(self._processes) if process.exitcode is None]

    def _listen(self, seconds: float) -> None:
        open_pipes = [pipe for pipe in self._pipes if not pipe.closed]
        if not open_pipes:
            time.sleep(seconds)
            return
        for pipe in wait(open_pipes, seconds):
            rank = self._pipes.index(pipe)
            try:
                data = os.read(pipe.fileno(), 65536)  # type: ignore[union-attr]
            except BlockingIOError:
                continue
            if not data:
                pipe.close()  # type: ignore[union-attr]
                continue
            *lines, self._heard[rank] = (self._heard[rank] + data.decode()).split("\n")
            self.moments[rank] += [(time.monotonic(), line) for line in lines]

    # ---------------------------------------------------------------- striking
    def signal(self, victims: list[int], number: signal.Signals) -> None:
        for rank in victims:
            process = self._processes[rank]
            if process.exitcode is None and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):  # it has ended since
                    os.kill(process.pid, number)

    def pid(self, rank: int) -> int | None:
        process = self._processes[rank]
        return process.pid if process.exitcode is None else None

    # ---------------------------------------------------------------- the end
    def finish(self) -> list[int]:
        """Kill what is left, as a batch system does; returns the exit codes, negative for a signal."""
        self.signal(self.alive(), signal.SIGKILL)
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            if not pipe.closed:
                pipe.close()
        return [process.exitcode for process in self._processes]

    def said(self) -> str:
        """What all ranks have printed."""
        files = sorted(self.output.iterdir())
        return "\n".join(f"[{file.name}] {line}" for file in files for line in file.read_text().splitlines())

    def lengths(self) -> dict[str, list[float]]:
        """Seconds that each kind of moment took, on all ranks; for a job that was left alone."""
        found: dict[str, list[float]] = {moment: [] for moment in ranks.MOMENTS}
        for moments, process in zip(self.moments, self._processes, strict=True):
            begun: dict[str, float] = {}
            for when, text in moments:
                sign, moment = re.fullmatch(r"([+-])(\w+)", text).groups()  # type: ignore[union-attr]
                if sign == "+":
                    begun[moment] = when
                elif moment in begun:
                    found[moment].append(when - begun[moment])
            assert process.exitcode == 0
        return found


def mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
