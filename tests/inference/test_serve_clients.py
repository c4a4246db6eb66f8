"""`megatron-bit serve` and clients that mean it ill or are slow: the real command, on 127.0.0.1 alone."""

from __future__ import annotations

import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from megatron_bit.inference import serve
from megatron_bit.inference.connections import Patience
from megatron_bit.inference.generate import Generator

FILES = 128  # descriptors of the server
JSON = {"Content-Type": "application/json"}
SHORT = {"model": "tiny", "prompt": "def", "max_tokens": 2, "steps": 2}
LONG = {"model": "tiny", "prompt": "def", "max_tokens": 2048, "n": 16, "steps": 256, "stream": True}


class _Process:
    """The command, with few descriptors."""

    def __init__(self, run: Path, log: Path, *options: str, key: str = "") -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = log
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **({serve.KEY: key} if key else {})}
        command = [sys.executable, "-m", "megatron_bit", "serve", str(run), "--port", str(self.port), "--name", "tiny"]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, *options],
                env=env,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES)),
            )
        deadline = time.monotonic() + 60
        while self.process.poll() is None and "serving" not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert self.process.poll() is None, log.read_text()
        while True:
            try:
                self.connect().close()
                return
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 10)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            client.request(method, path, body, headers or {})
            answer = client.getresponse()
            text = answer.read()
            assert not any(name.lower().startswith("access-control") for name, _ in answer.getheaders())
            return answer.status, json.loads(text) if "json" in answer.headers.get("content-type", "") else text
        finally:
            client.close()

    def complete(self, headers: dict[str, str] | None = None, **body: Any) -> tuple[int, Any]:
        return self.ask("POST", "/v1/completions", json.dumps({**SHORT, **body}).encode(), headers or JSON)

    def end(self, number: int = signal.SIGTERM) -> str:
        """The log."""
        self.process.send_signal(number)
        self.process.wait(30)
        return self.log.read_text()


@pytest.fixture(scope="module")
def process(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Process]:
    it = _Process(tiny_run, tmp_path_factory.mktemp("process") / "log", "--allow-host", "box.example", key="hush-hush")
    yield it
    log = it.end()
    assert "Traceback" not in log and "hush" not in log
    assert all(line.isprintable() for line in log.splitlines()), log


BEARER = {"Authorization": "Bearer hush-hush"}
HOSTS = {
    "localhost": 200, "LocalHost:8000": 200, "localhost.": 200, "127.0.0.1": 200, "127.9.8.7:1": 200, "[::1]": 200,
    "[::1]:80": 200, "box.example": 200, "BOX.example:443": 200, "evil.example": 403, "localhost.evil.example": 403,
    "evil.example:8000": 403, "127.0.0.1.evil.example": 403, "localhost@evil.example": 403, "": 403, "0.0.0.0": 403,
    "10.0.0.1": 403, "[::2]": 403, "localhost:x": 403, "sub.box.example": 403, "\x1b[31m": 403,
}  # fmt: skip


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models"])
def test_hosts(path: str, process: _Process) -> None:
    got = {}
    for host in HOSTS:
        with process.connect() as it:
            head = (
                f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer hush-hush\r\nConnection: close\r\n\r\n"
            )
            it.sendall(head.encode())
            got[host] = int(it.makefile("rb").readline().split()[1])
    assert got == HOSTS


ORIGINS = {
    "http://localhost:3000": 200, "https://127.0.0.1": 200, "http://[::1]:5": 200, "https://box.example": 200,
    "http://evil.example": 403, "null": 403, "file://": 403, "http://localhost.evil.example": 403,
    "chrome-extension://abc": 403, "localhost": 403, "http://localhost/x": 403,
}  # fmt: skip


def test_origins(process: _Process) -> None:
    for origin, status in ORIGINS.items():
        got = process.ask("GET", "/health", headers={"Origin": origin})
        assert got[0] == status, (origin, got)
        if status == 403:
            assert got[1]["error"]["type"] == "invalid_request_error" and "--allow-host" in got[1]["error"]["message"]
        assert process.complete({**JSON, **BEARER, "Origin": origin})[0] == status
    assert process.ask("GET", "/health", headers={"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert process.ask("GET", "/health", headers={"Sec-Fetch-Site": "none"})[0] == 200
    own = {"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost:3000"}  # asked for as 127.0.0.1
    assert process.ask("GET", "/health", headers=own)[0] == 200


def test_content_types(process: _Process) -> None:
    form = "application/x-www-form-urlencoded"
    data = json.dumps(SHORT).encode()
    for kind, more, status in (
        ("application/json", {}, 200),
        ("Application/JSON; charset=utf-8", {"Origin": "http://localhost"}, 200),
        (form, {}, 200),  # curl -d
        ("", {}, 200),
        (form, {"Referer": "http://localhost/"}, 415),
        (form, {"Origin": "http://localhost"}, 415),
        ("", {"Sec-Fetch-Mode": "no-cors"}, 415),
        ("text/plain", {}, 415),
        ("multipart/form-data; boundary=x", {}, 415),
        ("text/plain, application/json", {}, 415),
    ):
        got = process.ask(
            "POST", "/v1/completions", data, {**BEARER, **more, **({"Content-Type": kind} if kind else {})}
        )
        assert got[0] == status, (kind, more, got)
        if status == 415:
            assert got[1]["error"]["message"].endswith("add -H 'Content-Type: application/json'")


def test_the_key(process: _Process) -> None:
    for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Bearer h\xfcsh"}):
        assert process.complete({**JSON, **headers})[0] == 401
        assert process.ask("GET", "/v1/models", headers=headers)[0] == 401
        assert process.ask("GET", "/health", headers=headers)[0] == 200
    assert process.ask("GET", "/v1/models", headers=BEARER)[0] == 200


def test_a_body_of_any_announced_length_is_refused_at_once(process: _Process) -> None:
    begin = time.monotonic()
    for length in (2**20 + 1, 10**12, 10**19):
        with process.connect() as it:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: {BEARER['Authorization']}\r\n"
            it.sendall(f"{head}Expect: 100-continue\r\nContent-Length: {length}\r\n\r\n".encode())
            assert it.makefile("rb").readline().split()[1] == b"413"
    assert time.monotonic() - begin < 3
    status, answer = process.complete({**JSON, **BEARER}, prompt="x" * 3 * 2**20)  # all of it is sent
    assert status == 413 and "longer than 1048576 bytes" in answer["error"]["message"]


def test_a_client_that_leaves_within_its_body(process: _Process) -> None:
    with process.connect() as it:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: {BEARER['Authorization']}\r\n"
        it.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        time.sleep(0.2)
    assert process.ask("GET", "/health")[0] == 200  # and the log has no traceback: the fixture looks


def test_bad_requests_say_so_in_one_shape(process: _Process) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/%1b%5b31m", 404),
        ("DELETE", "/health", 405),
        ("GET", "/health/", 404),
    ):
        got = process.ask(method, path)
        assert got[0] == status and got[1]["error"]["message"].isprintable(), got
    with process.connect() as it:
        it.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert b" 200 " in it.makefile("rb").readline()


def test_clients_that_hold_connections_shut_nobody_out(process: _Process) -> None:
    """More half requests than descriptors: others are told so at once, and served when those are late."""
    held = []
    try:
        for number in range(200):
            it = process.connect()
            held.append(it)
            it.sendall(b"" if number % 4 == 0 else b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-a: ")
        begin = time.monotonic()
        with process.connect() as it:
            it.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            head, _, body = it.makefile("rb").read().partition(b"\r\n\r\n")
        assert time.monotonic() - begin < 3
        assert head.startswith(b"HTTP/1.1 503 ") and json.loads(body)["error"]["message"].startswith("too many")
        while process.complete({**JSON, **BEARER})[0] == 503:  # Patience.head is 10 s
            assert time.monotonic() - begin < 15
            time.sleep(0.3)
        assert process.complete({**JSON, **BEARER})[0] == 200
        answers = []
        for it in held:
            it.settimeout(5)
            answers.append(it.recv(100))  # all are ended
        assert {answer[:13] for answer in answers} == {b"", b"HTTP/1.1 408 ", b"HTTP/1.1 503 "}
    finally:
        for it in held:
            it.close()
    log = process.log.read_text()
    assert len(re.findall("connections are taken", log)) == 1 and len(log.splitlines()) < 10, log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_with_streams_under_way_leaves_no_traceback(number: int, tiny_run: Path, tmp_path: Path) -> None:
    """One reads, one does not, one waits, one has sent half a body, one half a head."""
    it = _Process(tiny_run, tmp_path / "log")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{it.port}/v1", api_key="none", max_retries=0)
    asked: Any = {key: value for key, value in LONG.items() if key != "steps"}
    seen: list[str] = []

    def read() -> None:
        try:
            for part in client.completions.create(**asked, extra_body={"steps": 256}):
                seen.append(part.choices[0].text)
        except openai.APIError as error:
            seen.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    while not seen:
        time.sleep(0.05)
    silent = []
    long = json.dumps(LONG).encode()
    post = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for rest in (*[b"Content-Length: %d\r\n\r\n%s" % (len(long), long)] * 2, b"Content-Length: 9\r\n\r\n{", b"X: "):
        silent.append(it.connect())
        silent[-1].sendall(post + rest)
    time.sleep(0.3)
    begin = time.monotonic()
    log = it.end(number)
    reader.join(10)
    for client_socket in silent:
        client_socket.close()
    assert time.monotonic() - begin < 15
    assert "Traceback" not in log and "Error" not in log, log
    assert "told to end" in seen[-1]


class _Here:
    """The same server in this process, with little patience."""

    def __init__(self, generator: Generator, patience: Patience) -> None:
        self.server = serve.Server(generator, "tiny", 1, 1, serve.Limits(max_tokens=4000), patience=patience)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._http = self.server.http(20)
        self._thread = threading.Thread(target=lambda: self._http.run(sockets=[self._socket]))
        self._thread.start()

    def connect(self) -> socket.socket:
        it = socket.socket()
        it.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        it.settimeout(10)
        it.connect(("127.0.0.1", self.port))
        return it

    def stop(self) -> None:
        self._http.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture
def here(tiny_run: Path) -> Iterator[_Here]:
    it = _Here(Generator(tiny_run), Patience(head=1.0, body=1.0, idle=1, unread=1.0, grace=0.5))
    yield it
    it.stop()


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SLOW = {  # what was sent at once, what is sent bit by bit, how the answers begin
    "nothing": (b"", b"", []),
    "half a head": (b"GET /health HTTP/1.1\r\nX: ", b"x", [408]),
    "half a second head": (HEALTH + b"GET /", b"x", [200, 408]),
    "nothing after an answer": (HEALTH, b"", [200]),
    "half a body": (POST + b"Content-Length: 1000\r\n\r\n{", b" ", [408]),
    "half a chunk": (POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", b"", [408]),
    "the rest of a refused body": (POST + b"Content-Length: 9999999\r\n\r\n{", b" ", [413]),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_client_is_not_waited_for(name: str, here: _Here) -> None:
    begun, bit, statuses = SLOW[name]
    got, begin = b"", time.monotonic()
    with here.connect() as it:
        it.sendall(begun)
        it.settimeout(0.2)
        while True:
            assert time.monotonic() - begin < 6, "is still connected"
            try:
                if bit:
                    it.sendall(bit)
                piece = it.recv(4096)
                if not piece:
                    break
                got += piece
            except TimeoutError:
                continue
            except ConnectionError:  # it was sent something after it had closed
                break
    assert [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", got)] == statuses
    assert time.monotonic() - begin > 0.9


def test_a_stream_that_nobody_reads_is_cancelled(here: _Here) -> None:
    body = json.dumps({**LONG, "max_tokens": 4000, "n": 64, "steps": 2}).encode()
    with here.connect() as it:
        it.sendall(POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        deadline = time.monotonic() + 40
        while not here.server.engine.load:
            time.sleep(0.02)
        while here.server.engine.load:
            assert time.monotonic() < deadline, "it generates for nobody"
            time.sleep(0.1)
        metrics = http.client.HTTPConnection("127.0.0.1", here.port, timeout=10)
        metrics.request("GET", "/metrics")
        text = metrics.getresponse().read().decode()
        metrics.close()
    assert 'mbit_requests_total{outcome="cancelled"} 1.0' in text
