"""A data folder behind a URL (whatever fsspec reads) or a command: fetched with retries, shards through a cache.

A folder `pipe:COMMAND` is read by a command of the user's, `pipe:ssh host cat /data/wiki/{file}`, which is split into
words once and run without a shell; `{file}` is a name that the manifest gives.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import random
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from megatron_bit.config import RemoteConfig
from megatron_bit.data.cache import ShardCache
from megatron_bit.errors import UserError
from megatron_bit.io.files import PARTIAL
from megatron_bit.io.trust import PIPE

CHUNK = 1 << 20
_NAME = re.compile(
    r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)?"
)  # no option, no way out of the folder
_number = itertools.count()


class RemoteFolder:
    """Files of one remote data folder."""

    def __init__(self, url: str, options: RemoteConfig) -> None:
        """Raises UserError: a command without `{file}`, or the cache folder cannot be made."""
        self.url, self.options = url.rstrip("/"), options
        if url.startswith(PIPE) and "{file}" not in url:
            raise UserError(f"data folder {url}: a command has to say where the name of a file goes, as {{file}}")
        home = options.cache or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "megatron_bit")
        folder = Path(home).expanduser()
        self.mirror = folder / "folders" / hashlib.sha256(self.url.encode()).hexdigest()[:16]  # of its small files
        try:
            self.mirror.mkdir(parents=True, exist_ok=True)
            self.cache = ShardCache(folder / "files", round(options.cache_gib * 2**30))
        except OSError as error:
            raise UserError(f"data.remote.cache {folder} cannot be used: {error.strerror}; choose another") from error
        self._pool: ThreadPoolExecutor | None = None
        self._asked: set[str] = set()

    def name(self, file: str) -> str:
        """Where a file lies, for messages."""
        return f"{self.url} (file {file})" if self.url.startswith(PIPE) else f"{self.url}/{file}"

    def copy(self, file: str) -> Path:
        """A small file as it is now, in the mirror. Raises FileNotFoundError, UserError."""
        path = self._mirrored(file)
        self._fetch(file, path, lambda partial: None)
        return path

    def place(self, file: str, data: bytes) -> None:
        """Write a small file into the mirror; several processes may."""
        path = self._mirrored(file)
        partial = _partial(path)
        partial.write_bytes(data)
        os.replace(partial, path)

    def open(self, file: str, sha256: str) -> IO[bytes]:
        """A file of known content, through the cache. Raises UserError."""

        def check(partial: Path) -> None:
            with open(partial, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != sha256:
                raise ValueError(f"SHA-256 {digest}, the manifest says {sha256}")

        try:
            return self.cache.open(sha256, lambda path: self._fetch(file, path, check))
        except FileNotFoundError as error:
            raise UserError(f"{self.name(file)} does not exist; copy it back or prepare again") from error

    def read(self, file: str, sha256: str) -> bytes:
        """The content of a small file, through the cache; a damaged copy there is fetched again. Raises UserError.

        What the second copy holds was hashed when it came, or by the process that has put it there since.
        """
        with self.open(file, sha256) as stream:
            data = stream.read()
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
            self.discard(sha256, stream)
        with self.open(file, sha256) as stream:
            return stream.read()

    def discard(self, sha256: str, file: IO[bytes]) -> None:
        """Forget the damaged copy `file`, so that `open` fetches it again. Raises UserError."""
        try:
            self.cache.discard(sha256, file)
        except OSError as error:
            path = self.cache.folder / sha256
            raise UserError(f"{path} is damaged and cannot be removed ({error.strerror}); remove it") from error

    def ahead(self, files: Iterable[tuple[str, str, int]]) -> None:
        """Begin to fetch (file, SHA-256, bytes), as many as the cache holds at a time, in background threads.

        What goes wrong there is said by `open`.
        """
        wanted, size = {}, 0
        for file, sha256, length in files:
            size += length
            if size <= self.cache.limit:
                wanted[sha256] = file
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.options.workers, thread_name_prefix="shard-fetch")
        for sha256 in wanted.keys() - self._asked:
            self._pool.submit(self._quietly, wanted[sha256], sha256)
        self._asked = set(wanted)

    def read_all(self, files: Iterable[tuple[str, str]]) -> list[bytes]:
        """The content of (file, SHA-256), several at a time. Raises UserError."""

        with ThreadPoolExecutor(self.options.workers) as pool:
            return list(pool.map(lambda pair: self.read(*pair), files))

    def close(self) -> None:
        """Forget what has not been begun."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool, self._asked = None, set()

    def _quietly(self, file: str, sha256: str) -> None:
        with contextlib.suppress(UserError, OSError):  # the reader will find the same, and says it
            self.open(file, sha256).close()

    def _mirrored(self, file: str) -> Path:
        self._check(file)
        path = self.mirror / file
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _check(self, file: str) -> None:
        if not _NAME.fullmatch(file):
            raise UserError(f"{self.url}: the manifest names a file {file!r}, which is no plain name; prepare again")

    def _fetch(self, file: str, target: Path, check: Callable[[Path], None]) -> None:
        """Bring a file to `target`, whole or not at all. Raises FileNotFoundError, UserError."""
        self._check(file)
        reason = ""
        for attempt in range(self.options.attempts):
            if attempt:
                time.sleep(min(30.0, 0.5 * 2 ** (attempt - 1)) * (0.5 + random.random()))
            partial = _partial(target)
            try:
                self._attempt(file, partial)
                check(partial)
                os.replace(partial, target)
                return
            except FileNotFoundError:
                raise
            except ImportError as error:
                raise UserError(f"{self.url} needs a package: {error}; pip install 'megatron-bit[remote]'") from error
            except OSError as error:
                if error.errno == errno.ENOSPC and not self.cache.clear():
                    raise UserError(
                        f"no space left for {self.name(file)} in {target.parent}; free some, or set data.remote.cache"
                    ) from error
                reason = str(error) or type(error).__name__
            except Exception as error:  # of any of fsspec's libraries
                reason = f"{type(error).__name__}: {error}"
            finally:
                partial.unlink(missing_ok=True)
        reason = " ".join(reason.split())
        raise UserError(
            f"{self.name(file)} cannot be fetched in {self.options.attempts} attempts (the last: {reason}); look at "
            "the network and the address"
        )

    def _attempt(self, file: str, partial: Path) -> None:
        """One try, given up when no byte has come for `timeout_seconds`. Raises whatever goes wrong."""
        transfer = _Transfer()
        work = self._command if self.url.startswith(PIPE) else self._download

        def run() -> None:
            try:
                work(file, partial, transfer)
            except BaseException as error:
                transfer.error = error
            transfer.done.set()

        threading.Thread(target=run, daemon=True, name="shard-transfer").start()
        while not transfer.done.wait(0.2):
            if time.monotonic() - transfer.last > self.options.timeout_seconds:
                transfer.give_up()
                raise TimeoutError(f"nothing came for {self.options.timeout_seconds:g} seconds")
        if transfer.error is not None:
            raise transfer.error

    def _download(self, file: str, partial: Path, transfer: _Transfer) -> None:
        import fsspec
        from fsspec.callbacks import Callback

        class Progress(Callback):
            def relative_update(self, inc: int = 1) -> None:
                transfer.moved()

        options: dict[str, Any] = {}
        if self.url.startswith(("http://", "https://")):
            import aiohttp  # whose own limit is five minutes for a file, whatever its size

            seconds = self.options.timeout_seconds
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
            options["client_kwargs"] = {"timeout": timeout}
        fs, path = fsspec.core.url_to_fs(f"{self.url}/{file}", **options)
        fs.get_file(path, str(partial), callback=Progress())

    def _command(self, file: str, partial: Path, transfer: _Transfer) -> None:
        words = [word.replace("{file}", file) for word in shlex.split(self.url.removeprefix(PIPE))]
        with (
            open(partial, "wb") as target,
            subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            ) as process,
        ):
            transfer.process = process
            said: list[bytes] = []
            assert process.stdout is not None and process.stderr is not None
            listener = threading.Thread(target=lambda: said.append(process.stderr.read()[-300:]), daemon=True)  # type: ignore[union-attr]
            listener.start()
            while data := os.read(process.stdout.fileno(), CHUNK):
                transfer.moved()
                target.write(data)
            code = process.wait()
            listener.join(1.0)
        if code:
            raise OSError(f"exit code {code}: {b''.join(said).decode(errors='replace').strip()}")


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.{os.getpid()}.{next(_number)}{PARTIAL}")


class _Transfer:
    """What the thread that waits knows of the thread that fetches."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.last = time.monotonic()
        self.error: BaseException | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self._wanted = True

    def moved(self) -> None:
        """Bytes have come. Ends the thread if nobody waits for them any more."""
        if not self._wanted:
            raise TimeoutError
        self.last = time.monotonic()

    def give_up(self) -> None:
        self._wanted = False
        if self.process is not None:
            self.process.kill()
