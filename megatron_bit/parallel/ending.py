"""How a job ends when one rank cannot go on: it says so in the store, and no other waits for it until a time-out."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_bit.errors import EXIT_RANK_LOST, EXIT_USER_ERROR, Exhausted, LocalUserError, RankLost, Stopped, UserError
from megatron_bit.io.exhausted import exhausted
from megatron_bit.io.files import write_atomic

_SAID = "megatron_bit/said"
POLL_SECONDS = 1.0
GRACE_SECONDS = 40.0  # for a rank that has heard the word to end by itself; longer than a last save is waited for


class LastWord:
    """The exit code under which the first rank that cannot go on ends the job, in the store of the job.

    A thread of every rank looks for it: under NCCL, and while groups are made, a rank would else wait for one that has
    left until the time-out. One for a process, as torch's default group.
    """

    def __init__(self, store: Any, rank: int, ranks: int) -> None:
        """store: of torch's rendezvous; a connection of our own to it is opened, which no wait of others blocks."""
        self._store, self.rank, self.ranks = store.clone(), rank, ranks
        self._heard: int | None = None
        self._over = threading.Event()

    def listen(self) -> None:
        """Start the thread; RuntimeError, which the others hear of, if there can be none."""
        threading.Thread(target=self._listen, name="last-word", daemon=True).start()

    def say(self, exit_code: int) -> bool:
        """Whether this rank is the first to say that the job ends, and with which code."""
        mine = f"{self.rank} {exit_code}"
        try:
            first = self._store.compare_set(_SAID, "", mine).decode() == mine
        except RuntimeError:  # the rank that holds the store has left, so it has said something
            return False
        if first and self.rank == 0:  # the store ends with this process: not before the others have looked into it
            time.sleep(2 * POLL_SECONDS)
        return first

    def heard(self) -> int | None:
        """The exit code that was said; None if nothing was, as far as can be known."""
        if self._heard is None:
            try:
                if self._store.check([_SAID]):
                    self._heard = int(self._store.get(_SAID).decode().split()[1])
            except RuntimeError:
                return None
        return self._heard

    def close(self) -> None:
        """The job has ended well."""
        self._over.set()

    def _listen(self) -> None:
        while self.heard() is None:
            if self._over.wait(POLL_SECONDS):
                return
        if not self._over.wait(GRACE_SECONDS):
            os._exit(self._heard or EXIT_USER_ERROR)


_word: LastWord | None = None


def begin(store: Any, rank: int, ranks: int) -> LastWord:
    """Called once a process, before the groups are made. Raises Exhausted or Stopped as `leaving`."""
    global _word
    _word = LastWord(store, rank, ranks)
    try:
        _word.listen()
    except RuntimeError as error:
        raise leaving(error) from None
    return _word


def said() -> int | None:
    """The exit code that a rank of this job has said; None if none has, as far as can be known."""
    return None if _word is None else _word.heard()


def over() -> None:
    """The job has ended well: nobody listens any more."""
    if _word is not None:
        _word.close()


@contextlib.contextmanager
def in_time(seconds: float, run: Path) -> Iterator[None]:
    """End this process if what is in the block, the coming together of the ranks of `run`, takes longer. torch's client
    of the store, among others, waits without a limit for a rank 0 that listens and does not answer (2.13)."""

    def leave() -> None:
        error = apart(seconds, "2 x parallel.timeout_minutes")
        print(f"megatron-bit: error: {error}", file=sys.stderr, flush=True)
        mark_lost(run, error)
        os._exit(EXIT_RANK_LOST)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # no thread to be had: `begin` says so, where the others can hear it
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def apart(seconds: float, limit: str) -> RankLost:
    """What to raise on a rank that has waited for the others, or for the store that they are to meet in."""
    rank, host, port = (os.environ.get(name, "?") for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    return RankLost(
        f"rank {rank}: the ranks have not come together in {seconds:.0f} s ({limit}) at MASTER_ADDR:MASTER_PORT = "
        f"{host}:{port}; one has ended (see what it says), is stopped, or its node is gone; the same command tries "
        "again"
    )


def mark_lost(run: Path, error: RankLost) -> None:
    """RUN/RANK_LOST, for the launcher, which sees torchrun's 1 in place of our exit code."""
    with contextlib.suppress(OSError):
        write_atomic(run / "RANK_LOST", f"{str(error).partition(';')[0]}\n".encode())


def alone(error: UserError) -> UserError:
    """What to raise for an error that this rank found by itself, and perhaps others as well: one of them says it."""
    if _word is None:
        return error
    if not _word.say(error.exit_code):
        return Stopped(str(error), _word.heard() or error.exit_code)
    return error if isinstance(error, Exhausted | RankLost) else LocalUserError(str(error))


def leaving(error: Exception) -> Exception:
    """What to raise for an error that ends this rank: if something ran out, the line that says so, after the others
    can hear of it; else the error itself."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if _word is not None:
        rank, ranks = _word.rank, _word.ranks
    out = exhausted(error, rank, ranks)
    return error if out is None else alone(out)


def lost(error: RuntimeError) -> Exception:
    """What to raise for an error of a collective: Stopped if another rank has said what is wrong, ConnectionError if
    it has gone without a word, or the error itself if it is of another kind."""
    text = str(error)
    if not isinstance(error, dist.DistError) and not any(words in text for words in _GONE):
        return error
    code = said()
    if code is not None:
        return Stopped(text, code)
    return ConnectionError(f"another rank has ended ({text.splitlines()[0][-100:]})")


def unheard(error: RuntimeError) -> list[int] | None:
    """The ranks that a collective waited for in vain; None for an error that is no time-out.

    Whoever has waited says so in the store, and looks a little later who has not: those ranks are stopped, or in
    something else. A store that does not answer is rank 0's; one that is gone went with rank 0, which had found out
    before, and the list is empty. Takes at most PROBE_SECONDS more.
    """
    if "timed out" not in str(error).lower():
        return None
    waiting: list[int] = []
    gone = threading.Event()

    def probe() -> None:
        store, me = dist.distributed_c10d._get_default_store(), dist.get_rank()
        try:
            store.set(f"{_WAITS}/{me}", "1")
            time.sleep(PROBE_SECONDS / 2)
            waiting.extend(r for r in range(dist.get_world_size()) if store.check([f"{_WAITS}/{r}"]))
        except RuntimeError:
            gone.set()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if gone.is_set():
        return []
    return [rank for rank in range(dist.get_world_size()) if rank not in waiting] if waiting else [0]


_WAITS, PROBE_SECONDS = "megatron_bit/waits", 6.0
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
