"""`megatron-bit serve`, asked by the official openai client."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from megatron_bit.inference import serve
from megatron_bit.inference.generate import Generator

PROMPT = "def f(self):"


@pytest.fixture(scope="module")
def generator(tiny_run: Path) -> Generator:
    return Generator(tiny_run)


class _Running:
    def __init__(self, server: serve.Server) -> None:
        self.server = server
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._uvicorn = server.http(100)
        self._thread = threading.Thread(target=lambda: self._uvicorn.run(sockets=[self._socket]))
        self._thread.start()

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.read().decode()

    def stop(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def running(generator: Generator) -> Iterator[_Running]:
    it = _Running(serve.Server(generator, "tiny", 1, 1, serve.Limits(max_tokens=4000, body_bytes=20_000)))
    yield it
    it.stop()


def _complete(client: openai.OpenAI, **arguments: Any) -> Any:
    extra = {"steps": arguments.pop("steps", 4), **arguments.pop("extra", {})}
    return client.completions.create(**{"model": "tiny", "prompt": PROMPT, **arguments}, extra_body=extra)


def test_the_text_is_that_of_generate(running: _Running, generator: Generator) -> None:
    want = generator.generate([PROMPT], 20, steps=4, seed=3)[0]
    got = _complete(running.client(), max_tokens=20, seed=3)
    assert got.choices[0].text == want["text"] and got.choices[0].finish_reason in ("length", "stop")
    assert got.usage.completion_tokens == want["tokens"]
    assert got.usage.prompt_tokens == len(generator.text.encode(PROMPT))


def test_streaming_gives_the_same_text_in_pieces(running: _Running) -> None:
    whole = _complete(running.client(), max_tokens=40, seed=5)
    stream = _complete(running.client(), max_tokens=40, seed=5, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    texts = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].text and len(texts) > 5
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_several_prompts_and_choices(running: _Running, generator: Generator) -> None:
    prompts = ["import os", PROMPT]
    got = _complete(running.client(), prompt=prompts, n=2, max_tokens=12, seed=0)
    want = generator.generate([p for p in prompts for _ in range(2)], 12, steps=4)
    assert [c.text for c in got.choices] == [w["text"] for w in want]
    assert len({c.text for c in got.choices}) == 4
    ids = generator.text.encode(PROMPT)
    assert _complete(running.client(), prompt=ids, max_tokens=12, seed=0).choices[0].text == want_one(generator, ids)


def want_one(generator: Generator, ids: list[int]) -> str:
    return generator.generate([generator.text.decode(ids)], 12, steps=4)[0]["text"]


def test_a_stop_string_ends_the_text_and_is_not_in_it(running: _Running) -> None:
    whole = _complete(running.client(), max_tokens=60, seed=1).choices[0].text
    stop = whole[10:13]
    for stream in (False, True):
        got = _complete(running.client(), max_tokens=60, seed=1, stop=[stop], stream=stream)
        text = "".join(c.choices[0].text for c in got) if stream else got.choices[0].text
        assert text == whole[: whole.index(stop)]
    assert _complete(running.client(), max_tokens=60, seed=1, stop=stop).choices[0].finish_reason == "stop"


NEUTRAL = {
    "seed": None, "n": None, "max_tokens": None, "stream": None, "echo": None, "logprobs": None, "suffix": None,
    "stop": None, "temperature": None, "top_p": None, "user": None, "stream_options": None, "best_of": None,
    "logit_bias": None, "presence_penalty": None, "frequency_penalty": None, "steps": None, "sampler": None,
    "guidance": None, "prompt": None, "top_k": None,
}  # fmt: skip
VALUES = [
    {"logit_bias": {}}, {"logit_bias": {"5": 0}}, {"presence_penalty": 0}, {"frequency_penalty": 0.0}, {"best_of": 1},
    {"best_of": 2, "n": 2}, {"n": 1}, {"suffix": ""}, {"top_p": 1}, {"top_p": 1.0}, {"user": "somebody"},
    {"echo": False}, {"logprobs": False}, {"temperature": 1}, {"guidance": 1}, {"stop": []}, {"seed": -1},
    {"stream_options": {"include_usage": None}}, {"top_k": -1}, {"min_p": 0.0}, {"repetition_penalty": 1.0},
    {"ignore_eos": False}, {"stop_token_ids": []}, {"skip_special_tokens": True}, {"use_beam_search": False},
]  # fmt: skip
NOT_NEUTRAL = [
    {"logit_bias": {"5": 1}}, {"presence_penalty": 0.5}, {"frequency_penalty": -1}, {"best_of": 3}, {"suffix": "x"},
    {"top_p": 0.9}, {"echo": True}, {"logprobs": 0}, {"logprobs": 5}, {"top_k": 40}, {"repetition_penalty": 1.1},
    {"ignore_eos": True}, {"min_tokens": 5}, {"temperature": 0.3}, {"unheard_of": 1}, {"seed": 1.5}, {"n": True},
    {"stream_options": {"include_usage": 1}}, {"presence_penalty": False}, {"top_p": "1"}, {"logit_bias": 0},
]  # fmt: skip


def _post(running: _Running, body: dict[str, Any]) -> tuple[int, Any]:
    data = json.dumps({"model": "tiny", "prompt": PROMPT, "steps": 2, "max_tokens": 2, "seed": 0, **body}).encode()
    request = urllib.request.Request(f"{running.url}/v1/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_what_changes_nothing_is_accepted(running: _Running) -> None:
    want = _post(running, {})[1]["choices"][0]["text"]
    for body in [*({key: None} for key in NEUTRAL), *VALUES]:
        status, answer = _post(running, body)
        assert status == 200, (body, answer)
        if not {"steps", "max_tokens", "prompt", "seed"} & body.keys():
            assert answer["choices"][0]["text"] == want, body
    status, answer = _post(running, NEUTRAL)
    assert status == 200 and answer["usage"]["completion_tokens"] <= 16


def test_without_a_seed_every_request_has_another_text(running: _Running) -> None:
    texts = {_post(running, {"seed": None, "max_tokens": 30})[1]["choices"][0]["text"] for _ in range(4)}
    assert len(texts) == 4
    given = {_post(running, {"seed": 5, "max_tokens": 30})[1]["choices"][0]["text"] for _ in range(3)}
    assert len(given) == 1


def test_one_model_is_retrieved_by_its_name(running: _Running) -> None:
    listed = running.client().models.list().data
    assert [running.client().models.retrieve(model.id) for model in listed] == listed and listed[0].id == "tiny"
    with pytest.raises(openai.NotFoundError, match="model 'org/other' is not served here; it is 'tiny'"):
        running.client().models.retrieve("org/other")


def test_what_would_change_the_text_is_refused_by_name(running: _Running) -> None:
    for body in NOT_NEUTRAL:
        status, answer = _post(running, body)
        name = next(iter(body))
        assert status == 400, (body, answer)
        error = answer["error"]
        assert error["type"] == "invalid_request_error" and error["param"].split(".")[0] == name, (body, error)
        assert error["message"].startswith(name) and "\n" not in error["message"]
    for body, said in (([1], "body"), ("null", "body")):
        data = json.dumps(body).encode()
        with pytest.raises(urllib.error.HTTPError, match="400") as caught:
            urllib.request.urlopen(urllib.request.Request(f"{running.url}/v1/completions", data), timeout=30)
        assert said in json.load(caught.value)["error"]["message"]


STRICT = {  # after a model and a prompt: what is said of it
    '"temperature":NaN': "body is no JSON: NaN is no finite number",
    '"temperature":-Infinity': "body is no JSON: -Infinity is no finite number",
    '"top_p":1e999': "body is no JSON: 1e999 is no finite number",
    f'"seed":{"9" * 5000}': "body is no JSON: Exceeds the limit (4300 digits) for integer string conversion",
    f'"max_tokens":{10**400}': f"max_tokens 1{'0' * 79}... is more than 4000",
    f'"n":{10**400}': f"1 prompts x n 1{'0' * 79}... have to be 1 to 64",
    '"seed":1,"seed":2': "seed is there twice",
    '"stop":"\\ud800"': "body has half of a surrogate pair, which is no character",
    f'"stop":{"[" * 5000}': "body is nested too deeply",
    '"\\u001b[31m":1': r"\x1b[31m is not known here, or means nothing to a BitLM",
    '"sampler":"\\u001b[2J"': r"sampler '\x1b[2J' does not exist; it may be",
}


@pytest.mark.parametrize("more", STRICT, ids=lambda more: more[:20])
def test_a_body_is_strict_json(more: str, running: _Running) -> None:
    data = f'{{"model":"tiny","prompt":"def",{more}}}'.encode()
    request = urllib.request.Request(f"{running.url}/v1/completions", data, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError, match="400") as caught:
        urllib.request.urlopen(request, timeout=30)
    assert json.load(caught.value)["error"]["message"].startswith(STRICT[more])


@pytest.mark.parametrize("key", ["", " ", "secret\n", "a\tb"])
def test_a_key_that_no_client_can_send(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_bit.errors import UserError

    monkeypatch.setenv(serve.KEY, key)
    with pytest.raises(UserError, match="MEGATRON_BIT_API_KEY is set, and empty or with spaces") as caught:
        serve.main(tmp_path, "127.0.0.1", 1, "tiny", 1, 1, 10, None)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "host", "allowed", "said"),
    [
        ("a\x1b[31m", "127.0.0.1", (), r"name 'a\\x1b\[31m' has to be printable characters"),
        ("", "127.0.0.1", (), "name '' has to be printable"),
        ("tiny", "ä" * 70, (), "--host 'äää.* cannot be used"),
        ("tiny", "127.0.0.1", ("http://box",), "--allow-host 'http://box' is no host"),
        ("tiny", "127.0.0.1", ("box:80",), "--allow-host 'box:80' is no host"),
        ("tiny", "127.0.0.1", ("*.example",), r"--allow-host '\*.example' is no host"),
        ("tiny", "127.0.0.1", ("",), "--allow-host '' is no host"),
    ],
)
def test_options_that_mean_nothing(name: str, host: str, allowed: tuple[str, ...], said: str, tmp_path: Path) -> None:
    from megatron_bit.errors import UserError

    with pytest.raises(UserError, match=said):
        serve.main(tmp_path, host, 1, name, 1, 1, 10, None, allowed)


def test_the_official_client_with_everything_it_can_send(running: _Running) -> None:
    ask = running.client().completions.create
    nothing: Any = {
        "best_of": 1, "echo": False, "frequency_penalty": 0, "logit_bias": {}, "logprobs": None, "max_tokens": 5,
        "n": 1, "presence_penalty": 0, "seed": 7, "stop": None, "suffix": None, "temperature": 1, "top_p": 1,
        "user": "x",
    }  # fmt: skip
    whole = ask(model="tiny", prompt=PROMPT, **nothing).choices[0].text
    for options in (None, {"include_usage": False}, {"include_usage": True}):
        parts = list(ask(model="tiny", prompt=PROMPT, stream=True, stream_options=options, **nothing))
        assert "".join(part.choices[0].text for part in parts if part.choices) == whole
        assert (parts[-1].usage is not None) == bool(options and options["include_usage"])
    with pytest.raises(openai.BadRequestError, match=r"presence_penalty 0.5: a BitLM is served without it") as caught:
        ask(model="tiny", prompt=PROMPT, presence_penalty=0.5)
    assert caught.value.param == "presence_penalty" and caught.value.type == "invalid_request_error"


REFUSED = {
    "temperature": (
        {"temperature": 0.3},
        400,
        "temperature means nothing to a diffusion head",
    ),
    "guidance": ({"extra": {"guidance": 2}}, 400, "guidance 2 needs a model trained with diffusion.condition_drop"),
    "logprobs": ({"logprobs": 3}, 400, "logprobs"),
    "model": ({"model": "other"}, 404, "model 'other' is not served here"),
    "max_tokens": ({"max_tokens": 4001}, 400, "max_tokens 4001 is more than 4000"),
    "steps": ({"steps": 1}, 400, "steps"),
    "token": ({"prompt": [5, 10**6]}, 400, "a token id is not between 0 and"),
    "texts": ({"n": 65}, 400, "have to be 1 to 64"),
    "body": ({"prompt": "x" * 30_000}, 413, "longer than 20000 bytes"),
    "stop": ({"stop": ["a", "b", "c", "d", "e"]}, 400, "up to 4 strings"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, running: _Running) -> None:
    arguments, status, message = REFUSED[name]
    with pytest.raises(openai.APIStatusError, match=message) as caught:
        _complete(running.client(), **arguments)
    assert caught.value.status_code == status


def test_a_client_that_leaves_stops_the_work(running: _Running) -> None:
    """Of many texts: a single one may come to its end before."""
    for stream in (True, False):
        if stream:
            chunks = _complete(running.client(), max_tokens=4000, n=16, stream=True, steps=64)
            next(iter(chunks))
            chunks.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                running.client().with_options(timeout=0.5).completions.create(
                    model="tiny", prompt=PROMPT, max_tokens=4000, n=16, extra_body={"steps": 64}
                )
        deadline = time.monotonic() + 10
        while json.loads(running.get("/health"))["active"]:
            assert time.monotonic() < deadline, "the request goes on without a client"
            time.sleep(0.05)
    assert 'mbit_requests_total{outcome="cancelled"} 2.0' in running.get("/metrics")


def test_a_full_queue_says_so(running: _Running) -> None:
    streams = [_complete(running.client(), max_tokens=4000, stream=True, steps=64) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="too many requests are waiting"):
        _complete(running.client())
    for stream in streams:
        stream.close()


def test_models_health_metrics(running: _Running) -> None:
    assert [card.id for card in running.client().models.list()] == ["tiny"]
    assert json.loads(running.get("/health"))["status"] == "ok"
    assert "mbit_generated_tokens_total" in running.get("/metrics")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        running.get("/v1/nothing")


def test_a_key_has_to_be_given(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(serve.KEY, "secret")
    it = _Running(serve.Server(generator, "tiny", 1, 1, serve.Limits()))
    try:
        assert _complete(it.client("secret"), max_tokens=3).choices[0].text
        for wrong in ("other", "sécret"):
            with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
                _complete(it.client(wrong), max_tokens=3)
    finally:
        it.stop()


def test_a_port_that_is_taken(generator: Generator, tmp_path: Path) -> None:
    from megatron_bit.errors import UserError

    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port} cannot be used: .*in use"):
            serve.main(tmp_path, "127.0.0.1", port, "tiny", 1, 1, 10, None)
