"""Runs of raw records: converted, generated from and evaluated, against the model that trains."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from generation import run_card
from gloo_ranks import run_ranks

from megatron_bit.checkpoint.load import load_weights
from megatron_bit.config import load_config
from megatron_bit.errors import UserError
from megatron_bit.evaluation.report import Request, evaluate, render
from megatron_bit.inference.convert import CODE, to_hf
from megatron_bit.inference.generate import Generator
from megatron_bit.inference.hf import bits_bitlm as hf_bits
from megatron_bit.inference.hf import noise_bitlm as hf_noise
from megatron_bit.model.build import build_model
from megatron_bit.model.chain import Before
from megatron_bit.parallel.groups import Groups
from megatron_bit.run.folder import newest_checkpoint

BITS = 21  # three bytes, of which the last has three bits that mean nothing; groups of 7, 7 and 7, or 5 to 6
KINDS: dict[str, dict[str, Any]] = {
    "chain": {
        "model.head.kind": "chain", "model.group_bits": 8, "diffusion.condition_drop": 0.3, "model.memory.rows": 40,
    },
    "groups": {"model.group_bits": 6},
    "bits": {"diffusion.self_condition": 0.5, "model.memory.rows": 40, "model.memory.orders": [1, 2]},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mbit_data.raw import RawOptions, prepare_raw

    folder = tmp_path_factory.mktemp("records")
    bits = np.random.default_rng(0).integers(0, 2, (3000, BITS), dtype=np.uint8)
    (folder / "feed.bin").write_bytes(np.packbits(bits, axis=1).tobytes())
    options = RawOptions(
        (str(folder / "feed.bin"),), folder / "data", BITS, document_records=50, validation_fraction=0.1
    )
    return prepare_raw(options, progress=False).folder


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Run and converted folder of a kind."""
    root, known = tmp_path_factory.mktemp("made"), {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in known:
            run, folder = root / "runs" / kind, root / kind
            settings = {
                "model.code": "raw", "model.bits": BITS, "model.num_layers": 2, "train.steps": 1, "evaluate.every": 1,
                "evaluate.samples": 4, **KINDS[kind],
            }  # fmt: skip
            assert run_ranks(tiny_runs.train, 2, tiny_runs.overrides(run, data, {**settings, "parallel.tp": 2})) == [
                0,
                0,
            ]
            to_hf(run, folder)
            known[kind] = run, folder
        return known[kind]

    return make


def random_records(seed: int, count: int) -> list[list[int]]:
    bits = np.random.default_rng(seed).integers(0, 2, (count, BITS), dtype=np.uint8)
    return np.packbits(bits, axis=1).tolist()


def test_packing_is_numpy_s() -> None:
    bits = np.random.default_rng(3).integers(0, 2, (2, 5, BITS), dtype=np.uint8)
    packed = hf_bits.pack(torch.from_numpy(bits) * 2.0 - 1)
    assert np.array_equal(packed.numpy(), np.packbits(bits, axis=-1))
    assert np.array_equal(hf_bits.unpack(packed, BITS).numpy(), bits.astype(np.int8) * 2 - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_opens_in_transformers(kind: str, made: Callable[..., Any]) -> None:
    from transformers import AutoModelForCausalLM

    _, folder = made(kind)
    names = {"config.json", "generation_config.json", "model.safetensors", *(file.name for file in CODE)}
    assert {p.name for p in folder.iterdir()} - {"curves.svg"} == {*names, "README.md"}
    assert run_card(folder) == "torch.Size([1, 32, 3])"
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 0
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    given = torch.tensor([random_records(1, 5)], dtype=torch.uint8)
    out = model.generate(given, max_new_tokens=7, seed=3)
    assert out.shape == (1, 12, 3) and out.dtype == torch.uint8
    ours = Generator(folder).run([random_records(1, 5)], 7, streamer=None, seed=3)
    assert out[:, 5:].tolist() == ours


@pytest.mark.parametrize("kind", KINDS)
def test_run_and_folder_and_any_batch_make_the_same_records(kind: str, made: Callable[..., Any]) -> None:
    run, folder = made(kind)
    prompts = [random_records(i, n) for i, n in enumerate((7, 0, 40))]
    together = Generator(run).run(prompts, 50, streamer=None, seed=2, sequences=[3, 4, 5])
    generator = Generator(folder)
    for i, prompt in enumerate(prompts):
        assert generator.run([prompt], 50, streamer=None, seed=2, sequences=[3 + i]) == [together[i]]
    assert all(record[-1] & 0b111 == 0 for row in together for record in row)
    assert len({tuple(record) for record in together[0]}) > 20


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_a_chain_draws_what_the_head_that_trains_says(
    temperature: float, made: Callable[..., Any], groups: Groups
) -> None:
    """Every block computed again without a cache, in one context; a group's value from the nats of all of them."""
    run, folder = made("chain")
    config = load_config(run / "config.yaml", ["parallel.tp=1"])
    (model,) = build_model(config, 0, groups)
    load_weights(newest_checkpoint(run), [model], groups)
    k, sizes = config.model.block_size, config.model.group_sizes
    prompt = random_records(5, 4)
    rows = [[0, 0, 0]] * (-len(prompt) % k) + prompt
    start, codes = len(rows), [hf_bits.codes_of(size, torch.zeros(1)) for size in sizes]
    while len(rows) < start + 12:
        block = len(rows) // k
        shape = (k, len(sizes), 2 ** max(sizes))
        elements = torch.arange(-(-k * len(sizes) * 2 ** max(sizes) // 4))
        words = hf_noise.uniforms(9, hf_noise.SAMPLING, torch.tensor([6]), torch.tensor([[block]]), 1, elements)
        uniforms = torch.stack(words, -1).flatten()[: k * len(sizes) * 2 ** max(sizes)]
        gumbel = -(-uniforms.log()).log().view(shape)
        window = torch.tensor([rows + [[0, 0, 0]] * k], dtype=torch.uint8)
        with torch.no_grad():
            hidden = model.hidden(window)
        values = model.bit_groups.index(model.codec.encode(window[0]))[:, None]  # [s, 1, G]
        for at in range(len(rows), len(rows) + k):
            for stage, size in enumerate(sizes):
                tried = values.repeat(1, 2**size, 1)
                tried[at, :, stage] = torch.arange(2**size)
                known = torch.arange(len(tried))[:, None].expand(tried.shape[:2])
                with torch.no_grad():
                    states, remembered = hidden.expand(-1, 2**size, -1), model.head.remember(tried, known)
                    nats = model.head(tried, Before(tried.roll(1, 0), known > 0, None, remembered, None), states)
                log_p, noise = -nats[at, :, stage], gumbel[at - len(rows), stage, : 2**size]
                values[at, 0, stage] = (log_p / temperature + noise if temperature else log_p).argmax()
        for at in range(len(rows), len(rows) + k):
            bits = torch.cat([codes[i][values[at, 0, i]] for i in range(len(sizes))])
            rows.append(np.packbits((bits > 0).numpy()).tolist())
    how = {"seed": 9, "sequences": [6], "temperature": temperature}
    assert Generator(folder).run([prompt], 12, streamer=None, **how) == [rows[start : start + 12]]


REQUEST = Request(
    likelihood=True, samples=4, tolerance=None, max_passes=None, noise_samples=None, texts=0, tokens=8, prefix=0,
    how={}, scorer=None, mauve_model=None, tasks=(), tasks_data=None, limit=None, weights="trained", data=None, seed=0,
    batch_size=3,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_is_the_trainer_s_validation(kind: str, data: Path, made: Callable[..., Any]) -> None:
    from dataclasses import replace

    run, folder = made(kind)
    if kind != "chain":
        request = replace(REQUEST, max_passes=2, tolerance=100.0)
    else:
        request = REQUEST
    found = evaluate(run, request)
    assert found.likelihood is not None and found.likelihood.bits_per_record is not None
    assert found.likelihood.perplexity is None and found.likelihood.bits_per_byte is None
    if kind == "chain":
        said = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()][-1]
        assert found.likelihood.nats_per_token == pytest.approx(said["nats_per_token_bound"], rel=1e-5)
    assert found.likelihood.bits_per_record == pytest.approx(found.likelihood.nats_per_token / np.log(2))
    assert "bits/record" in render(found) and "perplexity" not in render(found)
    of_folder = evaluate(folder, replace(request, data=str(data), texts=2, scorer=run))
    assert of_folder.skipped == "skipped, because its tokens are raw records and no text: --texts"
    if kind == "chain":
        assert of_folder.likelihood == found.likelihood
    with pytest.raises(UserError, match="--texts are about text"):
        evaluate(run, replace(request, likelihood=False, texts=2, scorer=run))


def test_text_and_records_are_told_apart(data: Path, tiny_data: Path, made: Callable[..., Any]) -> None:
    from dataclasses import replace

    with pytest.raises(UserError, match=f"a model of records of {BITS} bits, and .* holds text"):
        evaluate(made("chain")[1], replace(REQUEST, data=str(tiny_data)))


def _command(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "megatron_bit", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_commands(made: Callable[..., Any], tmp_path: Path) -> None:
    run, folder = made("chain")
    prompt = random_records(1, 5)
    (tmp_path / "prompt.bin").write_bytes(np.array(prompt, dtype=np.uint8).tobytes())
    done = _command(
        "generate", run, "--prompt-file", tmp_path / "prompt.bin", "--max-tokens", 9, "--out", tmp_path / "o"
    )
    assert done.returncode == 0, done.stderr
    expected = Generator(folder).run([prompt], 9, streamer=None, seed=0)[0]
    assert (tmp_path / "o").read_bytes() == np.array(expected, dtype=np.uint8).tobytes()
    shown = _command("generate", folder, "--prompt", "".join(bytes(r).hex() for r in prompt), "--max-tokens", 9)
    assert shown.stdout.splitlines()[1:] == [bytes(r).hex() for r in [*prompt, *expected]]
    (tmp_path / "prompt.bin").write_bytes(b"1234")
    for words, said in (
        (("generate", run, "--prompt", "12zz34"), "give records as hexadecimal digits"),
        (("generate", run, "--prompt-file", tmp_path / "prompt.bin"), "4 bytes are no whole number of records of 3"),
        (("generate", run, "--stream"), "--stream is for text"),
        (("generate", run, "--max-tokens", 2, "--out", tmp_path / "o"), "is there already, and nothing is overwritten"),
        (("generate", run, "--data", tmp_path), "has no use here"),
        (("serve", run, "--port", 18123), "makes raw records, and serve is for text"),
    ):
        done = _command(*words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
    assert (tmp_path / "o").read_bytes() == np.array(expected, dtype=np.uint8).tobytes()
