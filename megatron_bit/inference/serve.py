"""`megatron-bit serve`: OpenAI's /v1/completions over HTTP, on Starlette and uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import secrets
import socket
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from megatron_bit.errors import UserError
from megatron_bit.inference import connections
from megatron_bit.inference.completion import Completion, Refused, brief, read_completion
from megatron_bit.inference.connections import Patience
from megatron_bit.inference.engine import Cancelled, Engine, Full, Piece, Request
from megatron_bit.inference.generate import SAMPLERS, Generator
from megatron_bit.inference.guard import Guard, allowed_hosts, check_content_type, is_loopback, plain_host

_log = logging.getLogger("uvicorn.error")
KEY = "MEGATRON_BIT_API_KEY"  # if it is set, requests have to carry it


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_tokens: int = 2048
    prompt_tokens: int = 16384
    texts: int = 64  # prompts x n
    body_bytes: int = 2**20


class Server:
    """The routes, and what they count. `hosts` may be asked for beside those of loopback; None: every Host."""

    def __init__(
        self,
        generator: Generator,
        name: str,
        workers: int,
        waiting: int,
        limits: Limits,
        hosts: frozenset[str] | None = frozenset(),
        patience: Patience = Patience(),
    ) -> None:
        self.engine = Engine(generator, workers, waiting)
        self.patience = patience
        self._generator, self._name, self._limits = generator, name, limits
        self._key = os.fsencode(os.environ.get(KEY, ""))
        self._begin = int(time.time())
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("mbit_requests_total", "Requests by outcome", ["outcome"], registry=registry)
        self._tokens = Counter("mbit_generated_tokens_total", "Tokens generated", registry=registry)
        self._prompt = Counter("mbit_prompt_tokens_total", "Prompt tokens read", registry=registry)
        self._first = Histogram("mbit_first_block_seconds", "Arrival to first text", registry=registry)
        self._whole = Histogram("mbit_request_seconds", "Arrival to the end", registry=registry)
        load = Gauge("mbit_requests_active", "Requests that run or wait", registry=registry)
        load.set_function(lambda: self.engine.load)
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{model:path}", self.one_model),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
            ],
            middleware=[Middleware(Guard, hosts=hosts)],
            exception_handlers={HTTPException: _no_such_route},
            lifespan=self._lifespan,
        )
        self.app.router.redirect_slashes = False

    def http(self, connections_at_once: int) -> connections.Server:
        """What serves it: uvicorn, with limits."""
        return connections.Server(
            connections.Config(self.app, self.patience, connections_at_once, self.engine.cancel)
        )  # fmt: skip

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.engine.close)

    async def health(self, request: HttpRequest) -> Response:
        return JSONResponse({"status": "ok", "model": self._name, "active": self.engine.load})

    async def metrics(self, request: HttpRequest) -> Response:
        return PlainTextResponse(generate_latest(self._registry).decode(), media_type="text/plain; version=0.0.4")

    async def models(self, request: HttpRequest) -> Response:
        try:
            self._authorize(request)
        except Refused as error:
            return error.response()
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def one_model(self, request: HttpRequest) -> Response:
        try:
            self._authorize(request)
            self._check_model(request.path_params["model"])
        except Refused as error:
            return error.response()
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": self._begin, "owned_by": "megatron_bit"}

    def _check_model(self, name: str) -> None:
        if name != self._name:
            raise Refused(404, f"model {brief(name)} is not served here; it is {self._name!r}", "model")

    async def completions(self, request: HttpRequest) -> Response:
        try:
            self._authorize(request)
            check_content_type(request.headers)
            body = self._read(await self._body(request))
            prompts = await asyncio.to_thread(self._prompts, body)  # others go on meanwhile
            seed = secrets.randbits(63) if body.seed is None else body.seed % 2**63
            job = Request(prompts, body.n, body.max_tokens, _stops(body), seed, self._how(body))
            pieces = self._start(job)
        except Refused as error:
            self._requests.labels("refused").inc()
            return error.response()
        except ClientDisconnect:
            self._requests.labels("cancelled").inc()
            return Response(status_code=499)  # nobody reads it
        answer = _Answer(self._name, sum(map(len, prompts)))
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(self._stream(job, pieces, answer, usage), media_type="text/event-stream")
        return await self._whole_text(request, job, pieces, answer)

    # ------------------------------------------------------------ one request
    def _authorize(self, request: HttpRequest) -> None:
        given = request.headers.get("authorization", "").encode("latin-1").removeprefix(b"Bearer ")
        if self._key and not hmac.compare_digest(given, self._key):
            raise Refused(401, "the API key is missing or wrong")

    async def _body(self, request: HttpRequest) -> bytes:
        most, data = self._limits.body_bytes, bytearray()
        too_long = Refused(413, f"the request is longer than {most} bytes")
        if int(request.headers.get("content-length", "0")) > most:  # digits, says h11
            raise too_long
        try:
            async with asyncio.timeout(self.patience.body):
                async for piece in request.stream():
                    data += piece
                    if len(data) > most:
                        raise too_long
        except TimeoutError:
            raise Refused(408, f"the body was not there within {self.patience.body:g} s") from None
        return bytes(data)

    def _read(self, data: bytes) -> Completion:
        body = read_completion(data)
        self._check_model(body.model)
        if body.max_tokens > self._limits.max_tokens:
            asked = brief(body.max_tokens, quoted=False)
            raise Refused(400, f"max_tokens {asked} is more than {self._limits.max_tokens}", "max_tokens")
        if body.steps == 1 and body.overlap is None:
            raise Refused(400, "steps 1 is for overlap; without it at least 2", "steps")
        if body.sampler is not None and body.sampler not in SAMPLERS:
            raise Refused(
                400, f"sampler {brief(body.sampler)} does not exist; it may be {', '.join(SAMPLERS)}", "sampler"
            )
        return body

    def _how(self, body: Completion) -> dict[str, Any]:
        """What was said of sampling; a diffusion head has no temperature but 1, and lets clients send that."""
        given = {name: getattr(body, name) for name in ("steps", "sampler", "temperature", "guidance", "overlap")}
        how = {key: value for key, value in given.items() if value is not None}
        if self._generator.model.config.head_kind == "diffusion" and how.get("temperature") == 1.0:
            del how["temperature"]
        try:
            self._generator.check(how)
        except UserError as error:
            raise Refused(400, str(error), str(error).partition(" ")[0]) from None
        return how

    def _prompts(self, body: Completion) -> list[list[int]]:
        given: Any = body.prompt
        texts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
        if not texts or len(texts) * body.n > self._limits.texts:
            many = brief(body.n, quoted=False)
            raise Refused(400, f"{len(texts)} prompts x n {many} have to be 1 to {self._limits.texts}", "prompt")
        vocabulary = self._generator.vocab_size
        rows = [self._generator.text.encode(text) if isinstance(text, str) else text for text in texts]
        if any(not 0 <= token < vocabulary for row in rows for token in row):
            raise Refused(400, f"a token id is not between 0 and {vocabulary - 1}", "prompt")
        if (longest := max(map(len, rows))) > self._limits.prompt_tokens:
            raise Refused(400, f"a prompt has {longest} tokens; at most {self._limits.prompt_tokens} may be", "prompt")
        return rows

    def _start(self, job: Request) -> asyncio.Queue[Piece | BaseException | None]:
        """Begin in a worker; the queue gets the pieces, and at the end None or what went wrong."""
        queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(item: Piece | BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, item)

        try:
            future = self.engine.submit(job, put)
        except Full:
            raise Refused(429, "too many requests are waiting; try again") from None
        future.add_done_callback(lambda f: put(Cancelled() if f.cancelled() else f.exception()))
        return queue

    async def _stream(
        self, job: Request, pieces: asyncio.Queue[Any], answer: _Answer, usage: bool
    ) -> AsyncIterator[str]:
        outcome = "cancelled"
        try:
            while isinstance(item := await pieces.get(), Piece):
                yield _event(answer.chunk([(item.row, item.text, item.finish_reason)]))
            if item is not None:
                outcome, error = _failure(item)
                yield _event(error)
                return
            if usage:
                yield _event({**answer.chunk([]), "usage": answer.usage(job.produced)})
            yield "data: [DONE]\n\n"
            outcome = "completed"
        finally:  # also when the client has gone
            job.cancelled.set()
            self._count(job, answer, outcome)

    async def _whole_text(
        self, request: HttpRequest, job: Request, pieces: asyncio.Queue[Any], answer: _Answer
    ) -> Response:
        texts: dict[int, str] = {}
        reasons: dict[int, str | None] = {}
        gone = asyncio.create_task(_disconnected(request))
        outcome = "cancelled"
        try:
            while True:
                item = asyncio.create_task(pieces.get())
                await asyncio.wait((item, gone), return_when=asyncio.FIRST_COMPLETED)
                if not item.done():
                    item.cancel()
                    return Response(status_code=499)  # nobody reads it
                piece = item.result()
                if not isinstance(piece, Piece):
                    break
                texts[piece.row] = texts.get(piece.row, "") + piece.text
                reasons[piece.row] = piece.finish_reason
            if piece is not None:
                outcome, error = _failure(piece)
                return JSONResponse(error, 503 if outcome == "cancelled" else 500)
            outcome = "completed"
            choices = [(row, texts[row], reasons[row]) for row in sorted(texts)]
            return JSONResponse({**answer.chunk(choices), "usage": answer.usage(job.produced)})
        finally:
            gone.cancel()
            job.cancelled.set()
            self._count(job, answer, outcome)

    def _count(self, job: Request, answer: _Answer, outcome: str) -> None:
        self._requests.labels(outcome).inc()
        self._tokens.inc(job.produced)
        self._prompt.inc(answer.prompt_tokens)
        self._whole.observe(time.perf_counter() - job.arrived)
        if job.first is not None:
            self._first.observe(job.first)


class _Answer:
    """The fixed parts of a response."""

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def chunk(self, choices: list[tuple[int, str, str | None]]) -> dict[str, Any]:
        listed = [{"index": i, "text": text, "logprobs": None, "finish_reason": r} for i, text, r in choices]
        return {**self._head, "choices": listed}

    def usage(self, produced: int) -> dict[str, int]:
        prompt = self.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": produced, "total_tokens": prompt + produced}


def _failure(error: BaseException) -> tuple[str, dict[str, Any]]:
    """The outcome, and what the client is told of it."""
    if isinstance(error, Cancelled):
        outcome, message = "cancelled", "the server is told to end"
    else:
        outcome, message = "failed", "generation failed"
        _log.error("generation failed: %s: %s", type(error).__name__, brief(error))
    return outcome, {"error": {"message": message, "type": "server_error", "param": None, "code": None}}


async def _no_such_route(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Refused(error.status_code, f"{request.method} {brief(request.url.path)}: {error.detail}").response()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _stops(body: Completion) -> tuple[str, ...]:
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stops) > 4 or not all(stops):
        raise Refused(400, "stop may hold up to 4 strings, none of them empty", "stop")
    return stops


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def main(
    run: Path,
    host: str,
    port: int,
    name: str,
    concurrency: int,
    waiting: int,
    max_tokens: int,
    data: str | None,
    allow_host: Sequence[str] = (),
) -> int:
    """Serve until a signal; what runs then has a few seconds to end.

    Raises:
        UserError: no model, the port is taken, a name or a key that cannot be used, too few descriptors.
    """
    hosts = allowed_hosts(allow_host)
    if not name or not name.isprintable():
        raise UserError(f"the model's name {name!r} has to be printable characters; give another with --name")
    _check_key()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))  # before the model is read, which may take long
        except OSError as error:
            raise UserError(f"--host {host} --port {port} cannot be used: {error.strerror}; choose others") from None
        except (TypeError, ValueError) as error:  # it is no name that could be looked up
            raise UserError(f"--host {host!r} cannot be used: {error}; choose another") from None
        generator = Generator(run, data)
        if generator.records is not None:
            raise UserError(
                f"{run} makes raw records, and serve is for text; use `megatron-bit generate {run} --out FILE`"
            )
        loopback = is_loopback(listener.getsockname()[0])
        if loopback:
            hosts |= {plain_host(host)}
        checked = hosts if loopback or allow_host else None
        server = Server(generator, name, concurrency, waiting, Limits(max_tokens=max_tokens), checked)
        http = server.http(connections.connections_that_fit())
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"serving {name!r} on {address}/v1 (also /health and /metrics); Ctrl-C ends it", flush=True)
        if not os.environ.get(KEY) and not loopback:
            print(f"warning: {host} is open to others, and {KEY} is not set: anybody may use this", flush=True)
        http.run(sockets=[listener])
    return 0


def _check_key() -> None:
    """UserError for a key that no client could send, or that would quietly mean none."""
    key = os.environ.get(KEY)
    if key is not None and (not key or key != key.strip() or any(letter < " " or letter == "\x7f" for letter in key)):
        raise UserError(f"{KEY} is set, and empty or with spaces or line ends around it; give a key, or unset it")
