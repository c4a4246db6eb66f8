"""Saving in the background: training waits for a copy of the state, a thread of every rank writes it.

Rank 0's thread waits for the others' parts in the folder and commits. The ranks hear of it without waiting: what
their threads have come to goes into the all-reduce that every step makes anyway (`Votes`), so that all ranks see the
same sums at the same step and draw the same conclusion.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bit.checkpoint.mirror import Mirror
from megatron_bit.checkpoint.save import Snapshot, snapshot, write_rank
from megatron_bit.errors import UserError
from megatron_bit.io.exhausted import exhausted
from megatron_bit.optim.optimizer import Optimizer
from megatron_bit.parallel.agree import on_every_rank, on_rank0
from megatron_bit.parallel.groups import Groups
from megatron_bit.run import checkpoints as folders
from megatron_bit.run import log as run_log

LEAVING_SECONDS = 30.0  # that a run which ends by an error waits for a save in flight


class Votes(NamedTuple):
    """What a rank says of the save in flight; summed over all ranks."""

    failed: float = 0.0
    committed: float = 0.0


class CheckpointWriter:
    """At most one save in flight. All ranks call `start`, `poll` and `wait` at the same steps."""

    def __init__(
        self, root: Path, keep: int, keep_every: int, patience: float, groups: Groups, mirror: Mirror | None
    ) -> None:
        """
        Args:
            root: folder of the checkpoints, seen by all ranks.
            keep, keep_every: which older ones stay (folder.prune).
            patience: seconds to wait for a write that has to end before the run can go on.
            mirror: where rank 0 has committed checkpoints copied to.
        """
        self._mirror = mirror
        self._root, self._keep, self._keep_every = root, keep, keep_every
        self._patience, self._groups = patience, groups
        self._buffers: dict[str, Tensor] = {}
        self._needed = 0  # bytes of a whole checkpoint
        self._state: Literal["idle", "writing", "ended", "failed"] = "idle"
        self._thread: threading.Thread | None = None
        self._written = threading.Event()  # this rank's part is on the disk, or will not be
        self._abandoned = threading.Event()
        self._lock = threading.Lock()
        self._problem: UserError | None = None
        self._failures = 0  # in a row
        self.good = -1  # the newest checkpoint up to this step is never pruned (TrainState.good)
        self._given_up = 0  # saves whose threads may still write, in folders and from buffers that stay theirs
        self._step = 0
        self._meta: dict[str, Any] = {}
        self._begin = self._stall = self._seconds = 0.0

    @property
    def step(self) -> int | None:
        """The step of the save in flight; the same on every rank."""
        return None if self._state == "idle" else self._step

    @property
    def votes(self) -> Votes:
        """What this rank has to say at the next step."""
        ended = self._state == "ended"
        return Votes(failed=float(self._state == "failed"), committed=float(ended and self._groups.rank == 0))

    def start(self, step: int, meta: dict[str, Any], optimizer: Optimizer) -> None:
        """Copy the state and let the thread write it; a save still in flight is waited for first."""
        self.wait()
        self._begin = time.perf_counter()
        self._step, self._meta = step, {**meta, "step": step}
        part = snapshot(optimizer, self._groups, self._buffers)
        if not self._needed:
            total = torch.tensor([float(part.bytes)], dtype=torch.float64, device=self._groups.device)
            dist.all_reduce(total)
            self._needed = int(total.item() * 1.02)  # the JSON beside the tensors
        try:
            on_rank0(lambda: folders.fresh(self._temporary, self._needed))
        except UserError as error:
            self._report(error)
            return
        self._run(part)
        self._stall = time.perf_counter() - self._begin

    def poll(self, votes: Votes) -> None:
        """Go on from what all ranks said at a step after `start`. Waits for a disk only after a failure."""
        if self._state != "idle" and votes.failed:
            self.wait()
        elif self._state != "idle" and votes.committed:
            self._done()

    def wait(self, required: bool = False) -> None:
        """Wait until the save in flight has ended, here and everywhere.

        Raises:
            UserError: on all ranks, if it failed and `required`, or if the one before it had failed too.
        """
        if self._state == "idle":
            if required and self._failures:
                assert self._problem is not None
                raise self._problem.with_text(f"checkpoint step {self._step} is not saved: {self._problem}")
            return
        try:
            on_every_rank(self._own_part)
            on_rank0(self._committed)
        except UserError as error:
            on_every_rank(self._give_up)
            self._report(error, required)
            return
        self._done()

    def _give_up(self) -> None:
        """From here on the save in flight cannot be committed, whenever its disk comes back."""
        if not self._lock.acquire(timeout=self._patience):  # it is in the middle of the renames
            raise UserError(f"{self._root} does not answer: renaming {self._temporary} has not ended")
        self._abandoned.set()
        self._state, temporary = "idle", self._temporary
        self._lock.release()
        self._given_up += 1
        assert self._thread is not None
        self._thread.join(1.0)
        if self._thread.is_alive():  # it still reads its buffers
            self._buffers = {}
        elif self._groups.rank == 0:  # give the room back
            shutil.rmtree(temporary, ignore_errors=True)

    def leave(self) -> None:
        """Let the save in flight end, if its disk answers; without the other ranks, one of which may have ended."""
        if self._thread is not None and self._state != "idle":
            self._thread.join(min(LEAVING_SECONDS, self._patience))

    def forget(self) -> None:
        """Give up the save in flight, whatever becomes of it. All ranks call it."""
        on_every_rank(self._give_up)

    def finish(self) -> None:
        """Wait for the copy of the last save; UserError on all ranks if it failed."""
        if self._mirror is not None:
            on_rank0(self._mirrored)

    def _mirrored(self) -> None:
        assert self._mirror is not None
        try:
            self._mirror.finish(self._patience)
        finally:
            self.tell()

    def tell(self) -> None:
        """Rank 0: print what the mirror has to say."""
        if self._mirror is not None:
            for line in self._mirror.news():
                print(line, flush=True)

    @contextlib.contextmanager
    def _wanted(self, abandoned: threading.Event) -> Iterator[None]:
        """Around the renames of a commit: either they are done, or the save is given up."""
        with self._lock:
            if abandoned.is_set():
                raise UserError("the save was given up")
            yield

    @property
    def _temporary(self) -> Path:
        """Of a name of its own after a save was given up, whose thread may write into its folder yet."""
        number = f".{self._given_up}" if self._given_up else ""
        return self._root / f"{self._final.name}{number}{folders.TEMPORARY}"

    @property
    def _final(self) -> Path:
        return folders.step_folder(self._root, self._step)

    def _run(self, part: Snapshot) -> None:
        """Write this rank's part, and commit on rank 0, in a thread."""
        written = self._written = threading.Event()
        abandoned = self._abandoned = threading.Event()
        temporary, final, meta, groups = self._temporary, self._final, self._meta, self._groups
        deadline = time.monotonic() + self._patience

        def body() -> None:
            problem = None
            try:
                write_rank(temporary, groups.rank, part)
                written.set()
                if groups.rank == 0:
                    in_time = lambda: not abandoned.is_set() and time.monotonic() < deadline  # noqa: E731
                    index, files = folders.join(temporary, groups.dims.world_size, in_time)
                    run_log.sync(final.parent.parent)
                    folders.commit(temporary, final, index, files, meta, self._wanted(abandoned))
            except BaseException as error:
                problem = exhausted(error, groups.rank, groups.dims.world_size)
                if problem is None:
                    problem = error if isinstance(error, UserError) else UserError(_uncommitted(final, error))
            with self._lock:  # either it is given up, or this is heard
                if not abandoned.is_set():
                    self._seconds = time.perf_counter() - self._begin
                    self._problem, self._state = problem, "failed" if problem else "ended"
            written.set()
            if abandoned.is_set() and groups.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

        self._state = "writing"
        self._thread = threading.Thread(target=body, name=f"checkpoint-{self._step}", daemon=True)
        self._thread.start()

    def _own_part(self) -> None:
        """Wait for this rank's part; UserError if it failed."""
        if not self._written.wait(self._patience):
            raise UserError(f"writing {self._temporary} has not ended in {self._patience:.0f} s; is the disk alive?")
        if self._state == "failed":
            assert self._problem is not None
            raise self._problem

    def _committed(self) -> None:
        """Rank 0: wait for the commit; UserError if it failed."""
        assert self._thread is not None
        self._thread.join(self._patience)
        if self._state != "ended":
            raise self._problem or UserError(f"committing {self._final} has not ended in {self._patience:.0f} s")

    def _done(self) -> None:
        assert self._thread is not None
        self._thread.join()  # it has said its last word
        self._state, self._failures = "idle", 0
        if self._groups.rank == 0:
            if self._mirror is not None:
                self._mirror.put(self._final)
            needed = set(self._mirror.needed) if self._mirror else set()
            if (good := folders.newest_until(self._root, self.good)) is not None:
                needed.add(good)
            folders.prune(self._root, self._keep, self._keep_every, needed)
            print(f"saved {self._final} in {self._seconds:.1f} s (training waited {self._stall:.2f} s)", flush=True)

    def _report(self, error: UserError, required: bool = False) -> None:
        self._failures += 1
        self._problem = error
        if required or self._failures > 1:
            again = f", and so did the save before it ({self._failures} in a row)" if self._failures > 1 else ""
            raise error.with_text(f"checkpoint step {self._step} is not saved: {error}{again}")
        if self._groups.rank == 0:
            print(
                f"warning: checkpoint step {self._step} is not saved: {error}; training goes on, "
                "a second failure in a row ends it",
                flush=True,
            )


def _uncommitted(final: Path, error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"{final} cannot be committed: {error.strerror}"
    return repr(error)
