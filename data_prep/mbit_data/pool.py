"""A function over texts, in worker processes and in order; the result does not depend on how many there are."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from mbit_data.read import Document
from megatron_bit.errors import UserError

TASK_CHARS = 256 * 1024  # text per task: small enough to spread, large enough to be worth sending
Result = TypeVar("Result")
Numbered = tuple[int, Document]


def map_documents(
    function: Callable[[list[tuple[int, str]], Any], list[Result]],
    argument: Any,
    documents: Iterable[Numbered],
    workers: int,
) -> Iterator[tuple[int, Document, Result]]:
    """(number, document, its result) in the order of the documents, where `function([(number, text)], argument)`
    gives one result for each. At most two tasks a worker are in memory ahead.

    `function` is a module's, so that a worker finds it. Raises UserError if a worker process dies.
    """
    tasks = _group(documents)
    if workers == 1:
        for task in tasks:
            yield from _join(task, function(_texts(task), argument))
        return
    # spawn: a fork of a process with threads (torch, if the caller has it) may inherit a held lock
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    waiting: deque[tuple[list[Numbered], Future[list[Result]]]] = deque()
    try:
        for task in tasks:
            waiting.append((task, pool.submit(function, _texts(task), argument)))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield from _join(first, future.result())
        while waiting:
            first, future = waiting.popleft()
            yield from _join(first, future.result())
    except BrokenProcessPool as error:
        raise UserError(
            f"a tokenizer process died ({workers} workers); out of memory? Try fewer workers. "
            'A script of your own must call prepare under `if __name__ == "__main__":`'
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _group(documents: Iterable[Numbered]) -> Iterator[list[Numbered]]:
    task: list[Numbered] = []
    chars = 0
    for number, document in documents:
        task.append((number, document))
        chars += len(document.text)
        if chars >= TASK_CHARS:
            yield task
            task, chars = [], 0
    if task:
        yield task


def _texts(task: list[Numbered]) -> list[tuple[int, str]]:
    return [(number, document.text) for number, document in task]


def _join(task: list[Numbered], results: list[Result]) -> Iterator[tuple[int, Document, Result]]:
    for (number, document), result in zip(task, results, strict=True):
        yield number, document, result


def _follow_parent() -> None:
    """End with the parent process, also when that is killed: a worker would wait for tasks for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
