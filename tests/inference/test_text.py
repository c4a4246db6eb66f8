"""Text of a run whose tokenizer puts a space in front of a text, by every way out: it is what the whole decodes to."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import sentencepiece
import tiny_runs
import torch
import uvicorn
from gloo_ranks import run_ranks
from mbit_data.prepare import PrepareOptions, prepare
from transformers import AutoTokenizer

from megatron_bit.inference import serve
from megatron_bit.inference.convert import to_hf
from megatron_bit.inference.generate import Generator
from megatron_bit.io.files import lines_of

PROMPTS = ("import", "def", "return", "of the", "self")
TOKENS, SEEDS = 12, range(4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model as Llama's was made, a run with it, and the run converted."""
    import email

    root, sources = tmp_path_factory.mktemp("spaces"), sorted(Path(email.__file__).parent.glob("*.py"))
    sentencepiece.SentencePieceTrainer.train(
        input=",".join(map(str, sources)), model_prefix=str(root / "llama"), vocab_size=421, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    options = PrepareOptions(
        inputs=(str(sources[0].parent),), out=root / "data", tokenizer=root / "llama.model", validation_fraction=0.2,
        workers=1,
    )  # fmt: skip
    prepare(options, progress=False)
    settings = {"train.steps": 80, "model.head.kind": "chain", "model.group_bits": 3, "model.num_layers": 2}
    settings |= {"optim.lr": 1e-2, "evaluate.every": 0}  # texts with words, and so with spaces
    assert run_ranks(tiny_runs.train, 1, tiny_runs.overrides(root / "run", root / "data", settings)) == [0]
    to_hf(root / "run", root / "folder")
    return root


@pytest.fixture(scope="module")
def generators(root: Path) -> dict[str, Generator]:
    return {name: Generator(root / name) for name in ("run", "folder")}


def decoded(name: str, root: Path, ids: list[int]) -> str:
    """By the library alone."""
    if name == "run":
        return sentencepiece.SentencePieceProcessor(model_file=str(root / "llama.model")).decode(ids)
    return AutoTokenizer.from_pretrained(root / name, trust_remote_code=True).decode(ids, skip_special_tokens=True)


def cases(name: str, root: Path, it: Generator) -> Iterator[tuple[str, int, list[int], list[int], str]]:
    for prompt in PROMPTS:
        for seed in SEEDS:
            ids = it.text.encode(prompt)
            new = it.run([ids], TOKENS, streamer=None, seed=seed)[0]
            whole = decoded(name, root, ids + new)
            assert whole.startswith(prompt)
            yield prompt, seed, ids, new, whole[len(prompt) :]


@pytest.mark.parametrize("name", ["run", "folder"])
def test_generate_and_stream(name: str, root: Path, generators: dict[str, Generator], capsys: Any) -> None:
    it, spaces = generators[name], 0
    for prompt, seed, _, new, right in cases(name, root, it):
        assert it.generate([prompt], TOKENS, seed=seed)[0]["text"] == right
        capsys.readouterr()
        it.generate([prompt], TOKENS, seed=seed, show=True)
        assert capsys.readouterr().out == f"{prompt}{right}\n"
        spaces += right != decoded(name, root, new)
    assert spaces > 2, "no text here begins with a space: nothing was tried"


@pytest.mark.parametrize("name", ["run", "folder"])
def test_stop_strings_are_of_the_text_behind_the_prompt(
    name: str, root: Path, generators: dict[str, Generator]
) -> None:
    """Also for who calls the model, with transformers' tokenizer; a string of the prompt alone stops nothing."""
    it, tried = generators[name], 0
    theirs: Any = AutoTokenizer.from_pretrained(root / "folder", trust_remote_code=True)
    for prompt, seed, ids, new, right in cases(name, root, it):
        lengths = [len(it.text.behind(ids, new[:count])) for count in range(len(new) + 1)]
        for begin, end in ((0, 2), (3, 5), (len(right) - 2, len(right))):
            stop = right[begin:end]
            if len(stop.strip("\ufffd")) < 2:
                continue
            end = right.index(stop) + len(stop)
            got = it.generate([prompt], TOKENS, seed=seed, stop=["never \u2603", stop])[0]
            assert got["text"] == right[:end]
            if "\ufffd" not in right:
                first = next(count for count, length in enumerate(lengths) if length >= end)
                assert got["tokens"] == first
                out = it.model.generate(
                    torch.tensor([ids]), max_new_tokens=TOKENS, seed=seed, stop_strings=stop, tokenizer=theirs
                )
                assert out[0, len(ids) :].tolist() == new[:first]
                tried += 1
        assert it.generate([prompt], TOKENS, seed=seed, stop=[prompt + right[:1]])[0]["tokens"] == len(new)
    assert tried > 5


@pytest.mark.parametrize("name", ["run", "folder"])
def test_serve(name: str, root: Path, generators: dict[str, Generator]) -> None:
    it = generators[name]
    server = uvicorn.Server(uvicorn.Config(serve.Server(it, "tiny", 1, 1, serve.Limits()).app, log_level="warning"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
    thread.start()
    try:
        port = listener.getsockname()[1]
        ask = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0).completions.create
        for prompt, seed, ids, _, right in cases(name, root, it):
            how: dict[str, Any] = {"model": "tiny", "max_tokens": TOKENS, "seed": seed}
            assert ask(prompt=prompt, **how).choices[0].text == right
            assert ask(prompt=ids, **how).choices[0].text == right
            assert "".join(part.choices[0].text for part in ask(prompt=prompt, stream=True, **how)) == right
            stop = right[1:3]
            if stop.strip("\ufffd"):
                got = ask(prompt=prompt, stop=[stop], **how)
                assert got.choices[0].text == right[: right.index(stop)] and got.choices[0].finish_reason == "stop"
                parts = list(ask(prompt=prompt, stop=stop, stream=True, **how))
                assert "".join(part.choices[0].text for part in parts) == got.choices[0].text
    finally:
        server.should_exit = True
        thread.join(timeout=30)


def test_lines_end_where_they_end() -> None:
    assert lines_of(b"one two\xe2\x80\xa8three\nfour\x0cfive\nsix\xc2\x85seven\x1c\x0b\n") == [
        "one two\u2028three",
        "four\x0cfive",
        "six\x85seven\x1c\x0b",
    ]
    assert lines_of(b"\xef\xbb\xbfa \r\nb\rc\n\n d") == ["a ", "b\rc", "", " d"]
    assert (lines_of(b""), lines_of(b"\n"), lines_of(b"\xef\xbb\xbf"), lines_of(b"\n\n")) == ([], [""], [], ["", ""])
    with pytest.raises(ValueError, match="utf-8"):
        lines_of(b"\xff")


def test_the_command_takes_prompts_as_they_are(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffdef \u2028x\x0cy\r\n\nz\x85".encode())
    command = [sys.executable, "-P", "-m", "megatron_bit", "generate", str(root / "run"), "--prompt-file", str(file)]
    done = subprocess.run([*command, "--max-tokens", "2", "--json"], capture_output=True, check=True, timeout=60)
    prompts = [json.loads(line)["prompt"] for line in done.stdout.splitlines()]
    assert prompts == ["def \u2028x\x0cy", "", "z\x85"]


def test_arguments_that_are_no_text(root: Path) -> None:
    for option in ("--prompt", "--stop"):
        command = [sys.executable, "-P", "-m", "megatron_bit", "generate", str(root / "run"), option, b"a\xff"]
        done = subprocess.run(command, capture_output=True, check=False, timeout=60)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and not done.stdout
        assert done.stderr.startswith(f"megatron-bit: error: {option} b'a\\xff' is not UTF-8".encode())
