"""Windows over long texts, and the error of a likelihood, against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from known import Known

from megatron_bit.config import load_config
from megatron_bit.evaluation import progress
from megatron_bit.evaluation.likelihood import measure, standard_errors
from megatron_bit.evaluation.progress import Progress
from megatron_bit.evaluation.scoring import encode_behind, score, windows
from megatron_bit.evaluation.validation import Validation


@given(st.integers(1, 200), st.integers(1, 5), st.integers(1, 9))
def test_every_token_is_scored_once_in_whole_blocks(length: int, k: int, blocks: int) -> None:
    found = windows(length, k, k * blocks)
    assert [w.counted for w in found] == [0, *(w.end for w in found[:-1])]
    assert found[-1].end == length
    for i, w in enumerate(found):
        assert 0 < w.end - w.begin <= k * blocks and w.begin <= w.counted < w.end
        assert i == 0 or ((w.end - w.begin) % k == 0 and w.counted - w.begin >= k * (blocks // 2))


def test_windows_by_hand() -> None:
    assert windows(10, 1, 4) == [(0, 4, 0), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    assert windows(7, 4, 8) == [(0, 7, 0)]
    assert windows(13, 4, 8) == [(0, 5, 0), (1, 9, 5), (5, 13, 9)]  # three tokens fill up the first window


def test_long_texts_in_any_batch() -> None:
    rows = [[97] * 40, [98] * 3, [], [97] * 16]
    for batch_size in (1, 2, 8):
        model = Known({"a": 0.5, "b": 2.0})
        nats = score(model, rows, seed=3, batch_size=batch_size, progress=Progress("x"))
        assert [n.tolist() for n in nats] == [[0.5] * 40, [2.0] * 3, [], [0.5] * 16]
        keys = sorted(key for _, some, _ in model.calls for key in some)
        assert keys == sorted([0, 1 << 32, 2 << 32, 3 << 32, 1, 3])  # no two windows share noise


def test_progress_in_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Progress("x").over(range(0, 10, 4), step=4, total=10)) == [0, 4, 8]
    assert capsys.readouterr().err == ""  # it was quick
    monkeypatch.setattr(progress, "SECONDS", -1.0)
    list(Progress("scoring").over(range(0, 10, 4), step=4, total=10))
    assert capsys.readouterr().err == "scoring: 4 of 10, 0 s left\nscoring: 8 of 10, 0 s left\n"


def test_standard_errors_by_hand() -> None:
    total, text, noise = standard_errors([[1.0, 2.0, 6.0], [3.0, 2.0, 4.0]])
    assert noise == pytest.approx(math.sqrt((2 + 0 + 2) / 3 / 6))  # variances 2, 0, 2 of three samples, two passes
    assert total == pytest.approx(math.sqrt((1 + 1 + 4) / 2 / 3))  # means 2, 2, 5
    assert text == pytest.approx(math.sqrt(1.0 - 4 / 18))
    assert standard_errors([[1.0, 3.0]]) == pytest.approx((1.0, 1.0, 0.0))


def test_standard_errors_tell_noise_from_text() -> None:
    g = np.random.default_rng(0)
    own, runs = g.normal(0, 0.5, 400), []
    for _ in range(50):
        runs.append((own + g.normal(0, 0.8, (3, 400))).tolist())
    _, text, noise = np.mean([standard_errors(run) for run in runs], axis=0)
    assert noise == pytest.approx(np.std([np.mean(run) for run in runs], ddof=1), rel=0.3)
    assert noise == pytest.approx(0.8 / math.sqrt(1200), rel=0.02)
    assert text == pytest.approx(own.std(ddof=1) / 20, rel=0.05)


def test_passes_go_on_until_the_noise_is_small(tiny_data: Path) -> None:
    model = Known({}, noise=0.2)
    model.head = "diffusion"
    validation = Validation(model, tiny_data)  # tokenized again, into bytes
    settings = {"samples": 50, "seed": 1, "batch_size": 8}
    found = measure(model, validation, tolerance=0.012, max_passes=16, **settings)
    assert not found.exact and found.noise_standard_error <= 0.012
    assert found.noise_standard_error == pytest.approx(0.2 / math.sqrt(50 * found.passes), rel=0.3)
    assert 4 <= found.passes <= 8 and abs(found.nats_per_token - 1.0) < 0.05
    assert {seed for *_, seed in model.calls} == set(range(1, 1 + found.passes))
    model.training = load_config(overrides=["train.seed=2"])  # of a run: its noise first, and none of it twice
    model.calls.clear()
    assert measure(model, validation, tolerance=1e-9, max_passes=4, **settings).passes == 4
    assert list(dict.fromkeys(seed for *_, seed in model.calls)) == [2, 1, 3, 4]
    limited = measure(model, validation, tolerance=1e-9, max_passes=3, **settings)
    assert limited.passes == 3 and limited.noise_standard_error > 1e-9
    model.head, model.noise = "softmax", 0.0
    exact = measure(model, validation, tolerance=1.0, max_passes=9, **settings)
    assert (exact.passes, exact.noise_samples, exact.noise_standard_error) == (1, 0, 0.0)
    assert exact.perplexity == pytest.approx(math.e)
    documents = validation.manifest.split("validation").documents
    # a byte a token, and a token for the end of each document
    assert exact.bits_per_byte * math.log(2) == pytest.approx(1 / validation.bytes_per_token)
    assert 0.9 < validation.bytes_per_token < 1.0 and documents


def test_encode_behind_takes_what_the_context_has_not() -> None:
    class Joins(Known):
        def encode(self, text: str) -> list[int]:
            return list(text.replace("a b", "X").encode())

    assert encode_behind(Known({}), "ab", "c") == ([97, 98, 99], 1)
    assert encode_behind(Known({}), "", "abc") == ([97, 98, 99], 3)
    assert encode_behind(Joins({}), "a", " b") == ([ord("X")], 1)
