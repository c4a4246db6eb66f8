"""Documents into token arrays, in worker processes; the result does not depend on how many there are."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mbit_data.read import Document
from mbit_data.tokenizer import Tokenizer
from megatron_bit.errors import UserError

TASK_CHARS = 256 * 1024  # text per task: small enough to spread, large enough to be worth sending


@dataclass(frozen=True)
class TokenizedDocument:
    """A document as it goes into a shard; `tokens` ends with the end-of-document id."""

    source: str
    index: int
    tokens: np.ndarray  # uint16 or uint32 [n]
    text_bytes: int
    text_hash: bytes  # SHA-256 of the UTF-8 text
    read_bytes: int


class _Encoded(NamedTuple):
    tokens: np.ndarray
    text_bytes: int
    text_hash: bytes


def tokenize_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, dtype: str, workers: int
) -> Iterator[TokenizedDocument]:
    """The documents, tokenized, in their order. At most two tasks a worker are in memory ahead.

    Raises UserError if a worker process dies.
    """
    tasks = _group(documents)
    model = str(tokenizer.path), tokenizer.sha256
    if workers == 1:
        for task in tasks:
            yield from _join(task, _encode([document.text for document in task], model, dtype))
        return
    # spawn: a fork of a process with threads (torch, if the caller has it) may inherit a held lock
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    waiting: deque[tuple[list[Document], Future[list[_Encoded]]]] = deque()
    try:
        for task in tasks:
            texts = [document.text for document in task]
            waiting.append((task, pool.submit(_encode, texts, model, dtype)))
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


def _group(documents: Iterable[Document]) -> Iterator[list[Document]]:
    task: list[Document] = []
    chars = 0
    for document in documents:
        task.append(document)
        chars += len(document.text)
        if chars >= TASK_CHARS:
            yield task
            task, chars = [], 0
    if task:
        yield task


def _join(task: list[Document], results: list[_Encoded]) -> Iterator[TokenizedDocument]:
    for document, encoded in zip(task, results, strict=True):
        yield TokenizedDocument(document.source, document.index, *encoded, read_bytes=document.read_bytes)


def _follow_parent() -> None:
    """End with the parent process, also when that is killed: a worker would wait for tasks for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@lru_cache(maxsize=1)
def _load(path: str, sha256: str) -> Tokenizer:
    """Once a process. The hash is there so that another tokenizer under the same path is another entry."""
    return Tokenizer(path)


def _encode(texts: list[str], model: tuple[str, str], dtype: str) -> list[_Encoded]:
    tokenizer = _load(*model)
    results = []
    for text in texts:
        data = text.encode()
        tokens = np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype=dtype)
        results.append(_Encoded(tokens, len(data), hashlib.sha256(data).digest()))
    return results
