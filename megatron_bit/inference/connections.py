"""uvicorn with what it lacks: an end to connections that hold a descriptor and ask nothing, and room for others.

uvicorn ends idle connections between two requests. It waits for ever for the rest of a request's head and for a client
that does not read its answer, and accepts until there are no descriptors left, which asyncio then logs without a pause.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from socket import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_bit.errors import UserError

ACCEPT = 8  # connections accepted in one turn of the event loop; up to three turns pass until they are counted
PARTING = 16  # clients that are told 503 and may still be sending
FILES = 24  # descriptors for all else: the model, the event loop, a library that opens a file
QUEUE = 1024  # connections that the kernel holds until they are accepted

_log = logging.getLogger("uvicorn.error")
_NO_ROOM = "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n"
_LATE = "HTTP/1.1 408 Request Timeout\r\n"


@dataclass(frozen=True)
class Patience:
    """How long, in seconds, a client may keep a connection without doing its part; docs/security.md has them too."""

    head: float = 10.0  # for a whole request line and headers, and for what is left of a body that was refused
    body: float = 30.0  # for a whole body
    idle: int = 5  # between two requests
    unread: float = 30.0  # an answer of which it takes nothing
    grace: float = 5.0  # for requests that run when the server is told to end


def connections_that_fit(most: int = 1000) -> int:
    """Connections that may be open at once, so that the process does not run out of descriptors.

    Raises:
        UserError: there is no room for 8.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return most
    used = len(os.listdir("/proc/self/fd"))
    room = allowed - used - 3 * ACCEPT - PARTING - FILES
    if room < 8:
        raise UserError(f"{allowed} open files (ulimit -n) are too few to serve; allow {allowed + 8 - room} or more")
    return min(most, room)


class Config(uvicorn.Config):
    """uvicorn's, for one app, and the limits of its connections."""

    def __init__(self, app: Any, patience: Patience, connections: int, end: Callable[[], None]) -> None:
        super().__init__(
            app,
            http=Connection,
            ws="none",
            loop="asyncio",  # ACCEPT is a matter of how this one accepts
            log_level="error",  # its warnings are about bad requests, a line each
            access_log=False,
            backlog=ACCEPT,
            timeout_keep_alive=patience.idle,
            timeout_graceful_shutdown=int(patience.grace) + 10,
            server_header=False,
        )
        self.patience, self.connections, self.end = patience, connections, end
        self.parting: dict[_Parting, None] = {}  # the oldest first
        self._said: dict[str, float] = {}

    def say(self, line: str) -> None:
        """A line in the log, and not the same one again for a minute: a flood is one event."""
        now = time.monotonic()
        if now - self._said.get(line, -60.0) >= 60.0:
            self._said[line] = now
            _log.error(line)


class Server(uvicorn.Server):
    """Ends requests that run by itself before it goes: uvicorn cancels them with a traceback each."""

    config: Config

    async def startup(self, sockets: list[socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._trouble)
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUE)  # asyncio accepts as many in a row as it lets wait; here the two differ

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        loop, grace = asyncio.get_running_loop(), self.config.patience.grace
        steps = [loop.call_later(grace, self.config.end), loop.call_later(grace + 1, self._abort)]
        await super().shutdown(sockets)
        for step in steps:
            step.cancel()

    def _abort(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def _trouble(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            self.config.say(f"no connection can be accepted: {error.strerror}; trying again every second")
        else:
            loop.default_exception_handler(context)


class Connection(H11Protocol):
    """One client. It owes a request head until one is there, and has to take what it is sent."""

    def __init__(self, config: uvicorn.Config, *args: Any, **more: Any) -> None:
        super().__init__(config, *args, **more)
        assert isinstance(config, Config)
        self._config = config
        self._head: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self._config.connections:
            self._config.say(f"all {self._config.connections} connections are taken; more are answered with 503")
            _Parting(transport, self._config.parting, self.loop)
            return
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that pause_writing says that something is unsent, however little
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._head = _stop(self._head)
        self._unread = _stop(self._unread)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self.transport.is_closing():
            self._head = _stop(self._head)
        elif self._head is None:  # further bytes do not buy further time
            self._head = self.loop.call_later(self._config.patience.head, self._late)

    def _late(self) -> None:
        self._head = None
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self.transport.write(_answer(_LATE, "the request's head did not arrive in time"))
        self.transport.close()

    def _should_upgrade(self) -> bool:
        return False  # and not three lines in the log

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(self._config.patience.unread, self._stalled)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread = _stop(self._unread)

    def _stalled(self) -> None:
        before, self._unsent = self._unsent, self.transport.get_write_buffer_size()
        if self._unsent >= before:
            self.transport.abort()  # the request sees that its client has gone
        else:
            self._unread = self.loop.call_later(self._config.patience.unread, self._stalled)


class _Parting(asyncio.Protocol):
    """A client that is told 503. Closed at once it might lose that: a reset would answer what it still sends."""

    def __init__(
        self, transport: asyncio.Transport, others: dict[_Parting, None], loop: asyncio.AbstractEventLoop
    ) -> None:
        if len(others) >= PARTING:
            next(iter(others))._leave()  # it had its time
        others[self] = None
        self._transport, self._others = transport, others
        transport.set_protocol(self)
        transport.write(_answer(_NO_ROOM, "too many connections; try again"))
        transport.write_eof()
        self._end = loop.call_later(1.0, self._leave)

    def _leave(self) -> None:
        self._others.pop(self, None)
        self._end.cancel()
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._others.pop(self, None)
        self._end.cancel()


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _answer(head: str, message: str) -> bytes:
    """A whole answer, shaped as all errors are."""
    error = {"message": message, "type": "server_error", "param": None, "code": None}
    body = json.dumps({"error": error})
    about = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    return f"{head}{about}\r\n{body}".encode()
