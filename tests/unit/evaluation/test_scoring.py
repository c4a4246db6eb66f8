"""Windows over long texts, and the error of a likelihood, against values worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
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
from megatron_bit.evaluation.report import Report, render
from megatron_bit.evaluation.samples import Samples, statistics
from megatron_bit.evaluation.scoring import encode_behind, score, windows
from megatron_bit.evaluation.task_files import Item
from megatron_bit.evaluation.tasks import last_word
from megatron_bit.evaluation.validation import Validation
from megatron_bit.io.measured import exponential, json_of, number, quotient, show


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
    # a byte a token, and a token for the end of each document
    assert exact.bits_per_byte * math.log(2) == pytest.approx(1 / validation.bytes_per_token)
    every = [row for row in validation.samples(10**6, 16) if 0 in row]
    assert every and validation.bytes_per_token == 1.0 - sum(row.count(0) for row in every) / validation._tokens


def test_encode_behind_takes_what_the_context_has_not() -> None:
    class Joins(Known):
        def encode(self, text: str) -> list[int]:
            return list(text.replace("a b", "X").encode())

    assert encode_behind(Known({}), "ab", "c") == ([97, 98, 99], 1)
    assert encode_behind(Known({}), "", "abc") == ([97, 98, 99], 3)
    assert encode_behind(Joins({}), "a", " b") == ([ord("X")], 1)


class Words(Known):
    """Tokens are the longest of some words; what a token's text is depends on nothing."""

    WORDS = ("unhappy", "happy", "ness", "un", "hap", "py", " the", " ", "th", "e", "a", "p", "he", "t", "h")

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            word = next(word for word in self.WORDS if text.startswith(word))
            ids.append(self.WORDS.index(word))
            text = text[len(word) :]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.WORDS[i] for i in ids)


@pytest.mark.parametrize(
    ("context", "text", "expected"),
    [
        (
            "unhap",
            "pyness",
            ["unhappy", "ness"],
        ),  # a token on the border is the text's
        ("unhap", "e", ["e"]),
        ("un", "happy", ["unhappy"]),
        ("happy ", "the", [" the"]),  # as many tokens as the context alone has, and one of them is not its
        ("hap", "he", ["he"]),
        ("a p", "py", ["py"]),
        ("a", " the", [" the"]),
    ],
)
def test_the_border_is_found_in_the_text(context: str, text: str, expected: list[str]) -> None:
    model = Words({})
    ids, count = encode_behind(model, context, text)
    assert model.decode(ids) == context + text
    assert [model.decode([i]) for i in ids[len(ids) - count :]] == expected


def test_what_is_too_large_for_a_float_is_infinite(tiny_data: Path) -> None:
    """And said: the report is kept, and its JSON is JSON."""
    model = Known({}, otherwise=1000.0)
    validation = Validation(model, tiny_data)
    found = measure(model, validation, samples=4, tolerance=1.0, max_passes=9, seed=0, batch_size=4)
    assert (found.nats_per_token, found.perplexity) == (1000.0, math.inf)
    texts = statistics("x", model, ["a", ""], ["bc", "d"], seed=0, batch_size=2)
    assert (texts.nats_per_token, texts.perplexity) == (1000.0, math.inf)
    word = last_word("lambada", model, [Item("a", (" b",), 0)] * 2, seed=0, batch_size=2)
    assert (word.nats_per_word, word.perplexity) == (2000.0, math.inf)
    samples = Samples(2, 3, 0, {}, "known", "softmax", texts, texts, None, "why", "bc")
    report = Report("known", "softmax", 1, None, "trained", 0, found, samples, (word,))
    shown = render(report)
    assert "  perplexity   inf\n" in shown and "(perplexity inf)" in shown and "nan" not in shown
    there = json.loads(json_of(asdict(report)), parse_constant=pytest.fail)
    assert there["likelihood"]["perplexity"] is None and there["tasks"][0]["perplexity"] is None
    assert there["likelihood"]["nats_per_token"] == 1000.0
    worse = Known({}, otherwise=math.nan)
    found = measure(worse, Validation(worse, tiny_data), samples=4, tolerance=1.0, max_passes=9, seed=0, batch_size=4)
    there = json.loads(json_of({"a": [asdict(found)]}), parse_constant=pytest.fail)
    assert there["a"][0]["perplexity"] is None and math.isnan(number(there["a"][0]["perplexity"]))


def test_measured_numbers() -> None:
    assert exponential(709.0) < math.inf == exponential(710.0) == exponential(math.inf)
    assert math.isnan(exponential(math.nan)) and exponential(-1e9) == 0.0
    assert (quotient(1, 2), quotient(3.0, 0), quotient(-3.0, 0)) == (0.5, math.inf, -math.inf)
    assert math.isnan(quotient(0.0, 0)) and math.isnan(quotient(math.nan, 0))
    assert [show(x) for x in (1.234, 1e12, math.inf, -math.inf, math.nan)] == ["1.23", "1e+12", "inf", "-inf", "nan"]
    assert number(2) == 2.0 and math.isnan(number(None))
