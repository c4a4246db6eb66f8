"""An iterator run ahead in a daemon thread, bounded, with errors passed on and a prompt end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class _Channel(Generic[T]):
    """What the threads share. The worker refers to this alone, so a dropped Prefetcher can be collected."""

    def __init__(self, depth: int):
        self.depth = depth
        self.items: deque[T] = deque()
        self.changed = threading.Condition()
        self.closed = False  # the consumer wants no more
        self.finished = False  # the source has no more
        self.error: BaseException | None = None

    def has_room(self) -> bool:
        return self.closed or len(self.items) < self.depth

    def has_news(self) -> bool:
        return self.closed or self.finished or bool(self.items)


def _fill(source: Iterator[T], channel: _Channel[T]) -> None:
    try:
        while True:
            with channel.changed:
                channel.changed.wait_for(channel.has_room)
                if channel.closed:
                    return
            item = next(source)  # outside the lock: this is the slow part
            with channel.changed:
                channel.items.append(item)
                channel.changed.notify_all()
    except StopIteration:
        pass
    except BaseException as error:
        channel.error = error
    finally:
        with channel.changed:
            channel.finished = True
            channel.changed.notify_all()


class Prefetcher(Iterator[T]):
    """At most `depth` items of `source` ahead of the consumer; an error of the source surfaces in `next`
    after the items made before it. Ends with `close`, or when it is garbage collected."""

    def __init__(self, source: Iterator[T], depth: int, name: str = "prefetch"):
        if depth < 1:
            raise ValueError(f"prefetch depth is {depth}; it must be at least 1")
        self._channel: _Channel[T] = _Channel(depth)
        self._thread = threading.Thread(target=_fill, args=(source, self._channel), name=name, daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        channel = self._channel
        with channel.changed:
            channel.changed.wait_for(channel.has_news)
            if channel.closed:
                raise StopIteration
            if channel.items:
                item = channel.items.popleft()
                channel.changed.notify_all()
                return item
            if channel.error is not None:
                raise channel.error
            raise StopIteration

    def close(self, timeout: float = 10.0) -> None:
        """Ask the thread to end and wait for it, `timeout` seconds at most: it finishes one item first."""
        with self._channel.changed:
            self._channel.closed = True
            self._channel.items.clear()
            self._channel.changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def __del__(self) -> None:
        if hasattr(self, "_thread"):
            self.close(timeout=0)  # no waiting inside the garbage collector
