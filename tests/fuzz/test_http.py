"""Bodies that nobody would send: /v1/completions answers each with 200 or says what is wrong with it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.types import Message

from megatron_bit.inference import serve
from megatron_bit.inference.completion import NEUTRAL, Completion


class _Text:
    """A byte is a token."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class _Generator:
    """A Generator without a model, which writes nothing."""

    text, vocab_size, eos_id = _Text(), 256, 0

    class model:
        class config:
            head_kind = "diffusion"

    def check(self, how: Any) -> None: ...

    def stream(self, prompt: Any, stop: Any, include: bool) -> Any:
        return None

    def run(self, prompts: Any, max_tokens: int, **_: Any) -> None: ...


def _ask(body: bytes) -> tuple[int, bytes]:
    server = serve.Server(_Generator(), "tiny", 1, 1, serve.Limits(body_bytes=4000))  # type: ignore[arg-type]
    sent: list[Message] = []
    given = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if given:
            return given.pop()
        await asyncio.sleep(60)  # a client that waits for its answer
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
    scope |= {"http_version": "1.1", "scheme": "http", "asgi": {"spec_version": "2.3"}, "server": None, "client": None}
    asyncio.run(asyncio.wait_for(server.app(scope, receive, send), 5))
    server.engine.close()
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


_numbers = st.integers() | st.floats() | st.sampled_from([2**63, 10**400, -1, 0, True, 1e308])
_texts = st.text(max_size=20) | st.sampled_from(["\ud800", "\0", "\x1b[31m", "x" * 300])
_values = st.recursive(
    st.none() | st.booleans() | _numbers | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=8,
)
_keys = st.sampled_from([*Completion.model_fields, *NEUTRAL]) | _texts
_bodies = st.dictionaries(_keys, _values, max_size=4).map(lambda body: {"model": "tiny", **body})
_json = (_bodies | _values).map(lambda tree: json.dumps(tree).encode())
_deep = st.tuples(st.sampled_from(['{"a":', "[", '{"model":"tiny","prompt":[[']), st.integers(1, 3000)).map(
    lambda pair: (pair[0] * pair[1]).encode()
)
_broken = st.tuples(_json, st.integers(0, 200), st.binary(max_size=3)).map(lambda t: t[0][: t[1]] + t[2] + t[0][t[1] :])


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(_json | _deep | _broken | st.binary(max_size=40))
@example(b'{"model":"tiny","prompt":"\\ud800"}')
@example(b'{"model":"tiny","prompt":"' + b"x" * 300 + b'"}')
@example(b"[" * 3000)
def test_a_body_is_answered_or_refused_by_what_is_wrong(body: bytes) -> None:
    status, answer = _ask(body)
    assert status == 200 or 400 <= status < 500, (status, answer)
    assert b"\x1b" not in answer
    if status != 200:
        error = json.loads(answer)["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        assert "\n" not in error["message"] and len(error["message"]) < 600
