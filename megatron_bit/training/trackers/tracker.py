"""What every tracker does, and the thread in which those run that speak to another machine."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from megatron_bit.io import trust

FILE = "trackers.json"  # in the run folder: under which id a run is known elsewhere, and what was sent there
CLOSE_SECONDS = 30.0  # that the end of a run waits for what is still to be sent
_WRITING = threading.Lock()  # two trackers have a thread each, and one file
_MOST_WAITING = 10_000  # calls; a tracker that cannot keep up loses the newest


@dataclass(frozen=True)
class About:
    """The run that is shown."""

    folder: Path
    id: str  # of the run, 16 hex digits: the same at every start
    config: Mapping[str, Any]  # resolved, and `shareable`
    step: int  # at which this start begins
    tokens: int


def shareable(value: Any) -> Any:
    """A configuration's tree for others' eyes: no command, and of a URL neither user, password nor query."""
    if isinstance(value, Mapping):
        return {key: shareable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [shareable(one) for one in value]
    if not isinstance(value, str) or not trust.acts(value):
        return value
    if value.startswith(trust.PIPE):
        return f"{trust.PIPE} a command"
    url = urlsplit(value)
    return urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))


class Tracker(Protocol):
    """Shows what rank 0 measures. Every call may raise; the run goes on without a tracker that did."""

    def scalars(self, group: str, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Values of a step: `train` or `validation`. Not one step twice (see `Sent`)."""

    def flush(self) -> None:
        """What was given is to be on its way."""

    def close(self, finished: bool) -> None:
        """No more comes in this start; `finished` if all steps of the run are done."""


class Sent:
    """What a tracker has been sent, over all starts of a run: what is done again after a crash is not shown twice.

    A step that is done again in the same layout is the same to the bit, in another one to rounding; one that a run does
    again because it has diverged is another, and then the first stays. log.jsonl has what counts.
    """

    def __init__(self, run: Path, name: str) -> None:
        self._path, self._name = run / FILE, name
        self._own: dict[str, Any] = _read(self._path).get(name, {})

    @property
    def id(self) -> str | None:
        """Under which the tracker itself knows the run."""
        found = self._own.get("id")
        return found if isinstance(found, str) else None

    def named(self, known_as: str) -> None:
        """Write down the id that the tracker has given."""
        self._own["id"] = known_as
        self._write()

    def is_new(self, group: str, step: int) -> bool:
        """Whether a step of a group was not sent yet; takes note that it is."""
        last = self._own.get(group, -1)
        if isinstance(last, int) and step <= last:
            return False
        self._own[group] = step
        return True

    def flush(self) -> None:
        """Write down what was sent."""
        self._write()

    def _write(self) -> None:
        with _WRITING, contextlib.suppress(OSError):  # a full disk is said by who writes the logs
            everything = {**_read(self._path), self._name: self._own}
            partial = self._path.with_name(f".{self._path.name}")
            partial.write_text(json.dumps(everything, indent=1))
            os.replace(partial, self._path)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


class Background:
    """A tracker in a thread of its own: a server that is slow, or away, is not waited for.

    Calls are made in their order. The first error ends it; `problem` says which, for the run to tell once.
    """

    def __init__(self, name: str, open_tracker: Callable[[], Tracker]) -> None:
        self.name, self.problem = name, ""
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, args=(open_tracker,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def _work(self, open_tracker: Callable[[], Tracker]) -> None:
        try:
            tracker = open_tracker()
            while (call := self._calls.get()) is not None:
                call(tracker)
        except Exception as error:  # whatever a client library raises
            self.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def scalars(self, group: str, step: int, tokens: int, values: Mapping[str, float]) -> None:
        self._put(lambda tracker: tracker.scalars(group, step, tokens, values))

    def flush(self) -> None:
        self._put(lambda tracker: tracker.flush())

    def _put(self, call: Callable[[Tracker], None]) -> None:
        if self.problem:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self.problem = f"{_MOST_WAITING} records wait to be sent"

    def close(self, finished: bool) -> None:
        """Wait for what is to be sent, but not for long."""
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(lambda tracker: tracker.close(finished))
            self._calls.put_nowait(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive() and not self.problem:
            self.problem = f"it has not taken everything within {CLOSE_SECONDS:.0f} s"
