"""Requests to text: a few worker threads over one model, a bounded queue, and text that comes out piece by piece."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from megatron_bit.inference.generate import Generator
from megatron_bit.inference.hf.text_bitlm import TextStream


class Full(Exception):
    """As many requests are waiting as may wait."""


class Cancelled(Exception):
    """Nobody wants the rest of this text."""


class Piece(NamedTuple):
    """A piece of one row's text; the last one has a reason."""

    row: int
    text: str
    finish_reason: Literal["stop", "length"] | None


@dataclass
class Request:
    """Texts to continue, together."""

    prompts: Sequence[list[int]]  # token ids
    choices: int  # continuations of each prompt
    max_tokens: int
    stop: tuple[str, ...]
    seed: int
    how: Mapping[str, Any]  # steps, sampler, temperature, guidance: what was said
    cancelled: threading.Event = field(default_factory=threading.Event)
    arrived: float = field(default_factory=time.perf_counter)
    first: float | None = None  # seconds until the first piece
    produced: int = 0  # tokens, over all rows


class Engine:
    """Runs `workers` requests at a time; `waiting` more may wait."""

    def __init__(self, generator: Generator, workers: int, waiting: int) -> None:
        self.generator = generator
        self._capacity = workers + waiting
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="generate")
        self._lock = threading.Lock()
        self._requests: dict[int, Request] = {}

    @property
    def load(self) -> int:
        """Requests that run or wait."""
        return len(self._requests)

    def submit(self, request: Request, emit: Callable[[Piece], None]) -> Future[None]:
        """Generate in a worker; `emit` is called there with every piece. The future has Cancelled, or what went wrong.

        Raises:
            Full: too many requests are waiting; nothing was begun.
        """
        with self._lock:
            if len(self._requests) >= self._capacity:
                raise Full
            self._requests[id(request)] = request
        return self._pool.submit(self._run, request, emit)

    def cancel(self) -> None:
        """Let what runs and what waits end with Cancelled, soon."""
        with self._lock:
            for request in self._requests.values():
                request.cancelled.set()

    def close(self) -> None:
        """End what runs and forget what waits."""
        self.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, request: Request, emit: Callable[[Piece], None]) -> None:
        try:
            if request.cancelled.is_set():  # while it waited
                raise Cancelled
            prompts = [prompt for prompt in request.prompts for _ in range(request.choices)]
            rows = [self.generator.stream(prompt, request.stop, include=False) for prompt in prompts]
            sink = _Sink(request, rows, self.generator.eos_id, emit)
            self.generator.run(
                prompts,
                request.max_tokens,
                streamer=sink,
                seed=request.seed,
                stop=request.stop,
                **request.how,
            )
        finally:
            with self._lock:
                del self._requests[id(request)]


class _Sink:
    """transformers' streamer protocol: first the prompts, then a token of every row at a time."""

    def __init__(self, request: Request, rows: list[TextStream], eos: int, emit: Callable[[Piece], None]) -> None:
        self._request, self._rows, self._eos, self._emit = request, rows, eos, emit
        self._begun, self._open = False, [True] * len(rows)

    def put(self, value: Tensor) -> None:
        if self._request.cancelled.is_set():
            raise Cancelled
        if not self._begun:
            self._begun = True
            return
        for number, (row, token) in enumerate(zip(self._rows, value.tolist(), strict=True)):
            if not self._open[number]:
                continue
            if self._request.first is None:
                self._request.first = time.perf_counter() - self._request.arrived
            self._request.produced += 1
            text = row.flush() if token == self._eos else row.add(token)
            self._open[number] = going = token != self._eos and not row.ended
            if text or not going:
                self._emit(Piece(number, text, None if going else "stop"))

    def end(self) -> None:
        for number, row in enumerate(self._rows):
            if self._open[number]:
                text = row.flush()
                self._emit(Piece(number, text, "stop" if row.ended else "length"))
