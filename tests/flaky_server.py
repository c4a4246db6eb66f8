"""A real HTTP server on loopback that serves a folder, badly when told to."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = Callable[[str, int], str]  # (file, which request for it, from 1) -> "", "drop", "busy", "stall" or "garble"


class FlakyServer:
    """`url` serves `folder`; `fault` says how each request fails. `served` counts whole answers by file."""

    def __init__(self, folder: Path, fault: Fault = lambda file, request: "") -> None:
        self.folder, self.fault = folder, fault
        self.requests: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.ending = threading.Event()
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                file = self.path.lstrip("/")
                with lock:
                    outer.requests[file] += 1
                    request = outer.requests[file]
                path = outer.folder / file
                if not path.is_file():
                    return self.send_error(404)
                fault, data = outer.fault(file, request), path.read_bytes()
                if fault == "busy":
                    return self.send_error(503)
                if fault == "garble":
                    data = data[:-1] + bytes([data[-1] ^ 1])
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if fault in ("drop", "stall"):
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    if fault == "stall":
                        outer.ending.wait(20)
                    self.close_connection = True
                    return self.connection.close()
                self.wfile.write(data)
                with lock:
                    outer.served[file] += 1

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.ending.set()
        self._server.shutdown()
        self._server.server_close()


def stream_tokens(url: str, cache: str, delay: float = 0.0, steps: int = 6) -> list[int]:
    """A process of its own: sums of the tokens of the first batches."""
    from megatron_bit.config import RemoteConfig
    from megatron_bit.data.batches import BatchStream
    from megatron_bit.data.corpus import Corpus
    from megatron_bit.data.manifest import load_manifest

    time.sleep(delay)
    manifest = load_manifest(url, options=RemoteConfig(cache=cache, timeout_seconds=5))
    stream = BatchStream(
        Corpus.of(manifest), "train", seq_length=10, seed=5, global_batch_size=4, micro_batch_size=4, dp_rank=0,
        dp_size=1, shuffle_shards=2,
    )  # fmt: skip
    batches = stream.steps(0)
    sums = [int(next(batches)[0].tokens.sum()) for _ in range(steps)]
    stream.close()
    return sums
