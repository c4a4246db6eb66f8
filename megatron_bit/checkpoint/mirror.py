"""Copies of a run's checkpoints behind a URL (`checkpoint.mirror`): made in the background, fetched by a new start.

The same files under the same names. An object store renames nothing, so COMMITTED, which holds the hash of the hashes,
is written last and removed first: a folder without it is no checkpoint. Only rank 0 is at work here, through fsspec.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_bit.errors import UserError
from megatron_bit.io.files import sync_folder, write_synced
from megatron_bit.run import checkpoint_schema as schema
from megatron_bit.run import checkpoints as folders
from megatron_bit.run.rewind import Rewind

ATTEMPTS, PAUSE = 4, 1.0  # of each file; seconds before the second one, doubled each time
CHUNK = 8 << 20
HASHES, MARK = "hashes.json", "COMMITTED"


class Mirror:
    """The checkpoints behind one URL; at most one copy in flight, of the newest checkpoint there was when it began.

    Every rank has one; only rank 0's is opened and used.
    """

    def __init__(self, url: str, keep: int, keep_every: int) -> None:
        """keep, keep_every: which older ones stay there (folder.superfluous)."""
        self.url = url.rstrip("/")
        self._keep, self._keep_every = keep, keep_every
        self._fs: Any = None
        self._root = ""
        self._wanted: Path | None = None
        self._at_work: Path | None = None
        self._news: list[str] = []
        self._failed = ""  # why the newest copy that was tried is not there
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._back: Rewind | None = None  # what it leaves behind is no checkpoint here either

    def open(self) -> None:
        """Raises UserError: no such kind of URL, or the package for it is missing."""
        import fsspec

        try:
            self._fs, path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"checkpoint.mirror {self.url} cannot be opened: {_reason(error)}") from None
        self._root = path.rstrip("/")

    # ---------------------------------------------------------------- copying, rank 0
    def put(self, checkpoint: Path) -> None:
        """Copy a committed checkpoint when the one in flight is done; of several that wait the newest."""
        with self._lock:
            self._wanted = checkpoint
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint-mirror", daemon=True)
                self._thread.start()
            self._lock.notify_all()

    def went_back(self, back: Rewind | None) -> None:
        """The run has gone back: what that leaves behind goes before the next copy, and is not fetched."""
        with self._lock:
            self._back = back

    def catch_up(self, checkpoint: Path) -> None:
        """Copy the checkpoint that a start continues, unless it is there: the start before may have been killed."""
        if checkpoint.name not in self.complete():
            self.put(checkpoint)

    @property
    def needed(self) -> set[Path]:
        """Checkpoints that are still read from."""
        with self._lock:
            return {folder for folder in (self._wanted, self._at_work) if folder is not None}

    def news(self) -> list[str]:
        """What has happened since the last call, a line each."""
        with self._lock:
            told, self._news = self._news, []
            return told

    def finish(self, patience: float) -> None:
        """Wait for all copies; UserError if the newest checkpoint is not there in the end."""
        with self._lock:
            ended = self._lock.wait_for(lambda: self._wanted is None and self._at_work is None, patience)
            if not ended:
                raise UserError(f"the copy to checkpoint.mirror {self.url} has not ended in {patience:.0f} s")
            if self._failed:
                raise UserError(self._failed)

    def _work(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._wanted is not None)
                self._at_work, self._wanted = self._wanted, None
                checkpoint = self._at_work
            assert checkpoint is not None
            begin, problem = time.monotonic(), ""
            try:
                self._drop()
                size = self._copy(checkpoint)
                self._prune()
            except Exception as error:  # whatever a file system of fsspec raises
                problem = f"{checkpoint} is not copied to checkpoint.mirror {self.url}: {_reason(error)}"
            seconds = time.monotonic() - begin
            with self._lock:
                self._failed = problem
                self._news.append(
                    f"warning: {problem}; training goes on, the next one is tried again"
                    if problem
                    else f"copied {checkpoint.name} to {self.url}: {size / 1e6:,.1f} MB in {seconds:.1f} s"
                )
                self._at_work = None
                self._lock.notify_all()

    def _copy(self, checkpoint: Path) -> int:
        """Returns the bytes written. The mark goes last; an older checkpoint of this step loses it first.

        OSError instead of the mark if the checkpoint here is another one by now, or another writer has put its mark
        there: the files there would be of both.
        """
        there = f"{self._root}/{checkpoint.name}"
        read, mark = os.stat(checkpoint), (checkpoint / MARK).read_bytes()
        _again(lambda: self._remove(f"{there}/{MARK}"))
        _again(lambda: self._fs.makedirs(there, exist_ok=True))
        names = sorted(path.name for path in checkpoint.iterdir() if path.name != MARK)
        for name in (*names, MARK):
            self._fs.invalidate_cache()
            if self._fs.exists(f"{there}/{MARK}"):
                self._mixed(there)
            if not os.path.samestat(read, os.stat(checkpoint)) or (checkpoint / MARK).read_bytes() != mark:
                raise OSError("it was replaced while it was copied")
            _again(lambda name=name: self._fs.put_file(str(checkpoint / name), f"{there}/{name}"))
            found, wanted = self._fs.size(f"{there}/{name}"), (checkpoint / name).stat().st_size
            if found != wanted:
                raise OSError(f"{there}/{name} has {found} bytes there and {wanted} here")
        if self._fs.cat_file(f"{there}/{HASHES}") != (checkpoint / HASHES).read_bytes():
            self._mixed(there)
        return folders.size(checkpoint)

    def _mixed(self, there: str) -> None:
        """Two have written at once, one of which stood still for long: better no checkpoint than one of both."""
        self._remove(f"{there}/{MARK}")
        raise OSError(f"another job has copied a checkpoint to {there} at the same time")

    def _prune(self) -> None:
        for name in folders.superfluous(self.complete(), self._keep, self._keep_every):
            self._delete(name)

    def _drop(self) -> None:
        """Delete what a rewind left behind: as the newest there is, it would be kept in the place of what follows."""
        with self._lock:
            back, self._back = self._back, None
        try:
            for name in self.complete() if back is not None else ():
                if self._left_behind(name, back):
                    self._delete(name)
        except Exception:
            self.went_back(back)  # once more before the next copy
            raise

    def _left_behind(self, name: str, back: Rewind | None) -> bool:
        if back is None or (folders.step_of(name) or 0) <= back.step:
            return False
        where = f"checkpoint.mirror {self.url}/{name}"
        text = self._fs.cat_file(f"{self._root}/{name}/meta.json")
        return back.leaves_behind(schema.check(text, where, "meta.json", schema.META))

    def _delete(self, name: str) -> None:
        self._remove(f"{self._root}/{name}/{MARK}")
        self._fs.rm(f"{self._root}/{name}", recursive=True)

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(path)

    # ---------------------------------------------------------------- fetching, rank 0
    def complete(self) -> list[str]:
        """Names of the committed checkpoints there, oldest first. Raises UserError."""
        try:
            found = _again(lambda: self._fs.glob(f"{self._root}/step-*/{MARK}"))
        except FileNotFoundError:
            return []
        except Exception as error:  # whatever a file system of fsspec raises
            raise UserError(f"checkpoint.mirror {self.url} cannot be read: {_reason(error)}") from error
        return folders.in_order(str(path).rsplit("/", 2)[1] for path in found)

    def fetch_newer(self, root: Path, check: Callable[[dict[str, Any], str], None]) -> str | None:
        """Bring the newest checkpoint there to `root`, if it has none as new; returns a line about it.

        Args:
            check: called with meta.json and where it is; UserError if it is of another run.

        Raises:
            UserError: it cannot be reached, is of another run, or arrives damaged.
        """
        try:
            return self._fetch_newer(root, check)
        except UserError:
            raise
        except Exception as error:  # whatever a file system of fsspec raises
            raise UserError(f"checkpoint.mirror {self.url} cannot be read: {_reason(error)}") from error

    def _fetch_newer(self, root: Path, check: Callable[[dict[str, Any], str], None]) -> str | None:
        here = [folder.name for folder in folders.complete(root)]
        there = self.complete()
        while there and self._left_behind(there[-1], self._back):
            there.pop()
        if not there:
            return None
        newer = folders.in_order([*here, there[-1]])[-1] not in here
        source = f"{self._root}/{there[-1]}"
        text, mark = self._fs.cat_file(f"{source}/{HASHES}"), self._fs.cat_file(f"{source}/{MARK}").decode().strip()
        if hashlib.sha256(text).hexdigest() != mark:
            raise UserError(f"checkpoint.mirror {self.url}/{there[-1]} is damaged: {HASHES} is not what {MARK} says")
        where = f"checkpoint.mirror {self.url}/{there[-1]}"
        files = schema.check(text, where, "hashes.json", schema.HASHES)
        check(schema.check(self._fs.cat_file(f"{source}/meta.json"), where, "meta.json", schema.META), where)
        if not newer:
            return None
        final = root / there[-1]
        temporary = final.with_suffix(folders.TEMPORARY)
        size, begin = sum(entry["bytes"] for entry in files.values()), time.monotonic()
        folders.fresh(temporary, size)
        print(f"fetching {there[-1]} from {self.url}: {size / 1e6:,.1f} MB", flush=True)
        try:
            for name, entry in files.items():
                digest = _again(lambda name=name: self._download(f"{source}/{name}", temporary / name))
                if digest != entry["sha256"]:
                    raise UserError(f"checkpoint.mirror {self.url}/{there[-1]}/{name} is damaged: SHA-256 {digest}")
            write_synced(temporary / HASHES, text)
            write_synced(temporary / MARK, mark.encode())
            sync_folder(temporary)
            folders.put_in_place(temporary, final, contextlib.nullcontext())
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return f"fetched {final} from {self.url} in {time.monotonic() - begin:.1f} s"

    def _download(self, source: str, target: Path) -> str:
        """Returns the SHA-256 of what came, and is on the disk."""
        total = hashlib.sha256()
        with self._fs.open(source, "rb") as stream, open(target, "wb") as file:
            while data := stream.read(CHUNK):
                total.update(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return total.hexdigest()


def _again(action: Callable[[], Any]) -> Any:
    """The action's result, with pauses between attempts; a file that is not there is not asked for again."""
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception:
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(PAUSE * 2**attempt)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
