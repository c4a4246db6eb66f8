"""Curves of `bench quality --tokens`: branches of one trunk, and what is read from them."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import pytest
import tiny_runs
import torch

from megatron_bit.bench import curves
from megatron_bit.bench.quality import main
from megatron_bit.errors import UserError


def test_tokens_and_budgets() -> None:
    found = [curves.parse_count(text, "--tokens") for text in ("400k", "0.4M", "8.2M", "1G", "12345")]
    assert found == [400_000, 400_000, 8_200_000, 10**9, 12_345]
    assert curves.budgets(["2M", "0.4M"], 1024, 50) == [391, 1953]
    for text in ("", "0", "2 M", "-1M", "1e6", "2T", "1.M"):
        with pytest.raises(UserError, match=r"--tokens .*is no number"):
            curves.parse_count(text, "--tokens")
    with pytest.raises(UserError, match="two are the same"):
        curves.budgets(["0.4M", "400k"], 1024, 50)
    with pytest.raises(UserError, match=r"40 steps .* end in their warm-up of 50; take at least 66,560 tokens"):
        curves.budgets(["40960", "2M"], 1024, 50)
    assert curves.budgets(["66560"], 1024, 50) == [65]


@pytest.mark.slow
def test_a_branch_is_to_the_bit_the_run_of_its_budget_alone(tiny_data: Path, tmp_path: Path) -> None:
    """And what is there is not trained again."""
    common = [
        "--preset", "laptop", *tiny_runs.overrides(tmp_path / "x", tiny_data, {"optim.warmup_steps": 2})[1:],
        *curves.SETTINGS,
    ]  # fmt: skip
    common = [word for word in common if not word.startswith(("run=", "train.steps="))]
    calls = []

    def call(words: list[str], run: Path) -> None:
        calls.append(run.name)
        ended = forked.command(list(words), tmp_path / "said")
        assert ended.code == 0, ended.err

    runs = curves.train(common, [5, 10], tmp_path / "rung", call)
    assert list(runs) == [5, 10] and calls == ["rung", "rung-5", "rung", "rung-10"]
    for steps, run in runs.items():
        alone = tmp_path / f"alone-{steps}"
        call(["train", *common, f"run={alone}", f"train.steps={steps}"], alone)
        ours, theirs = (tiny_runs.read(folder) for folder in (run, alone))
        assert ours.loss == theirs.loss and len(ours.loss) == steps
        assert all(torch.equal(weight, theirs.weights[name]) for name, weight in ours.weights.items())
    curves.train(common, [5, 10], tmp_path / "rung", call)
    assert calls[4:] == ["alone-5", "alone-10"]


def test_a_law_is_found_again() -> None:
    tokens = [0.2e6, 0.4e6, 1e6, 2e6, 8e6]
    law = curves.fit(tokens, [2.5 + 1.1 * (t / 1e6) ** -0.4 for t in tokens])
    assert law is not None
    assert (
        law.limit == pytest.approx(2.5, abs=0.05)
        and law.terms["T"][0] == pytest.approx(1.1, abs=0.05)
        and law.error < 1e-3
    )
    assert curves.fit(tokens[:3], [4.0, 3.5, 3.2]) is None
    falling = curves.fit(tokens, [(t / 1e6) ** -0.5 for t in tokens])
    assert falling is not None and falling.limit == pytest.approx(0.0, abs=1e-6)
    noisy = curves.fit(tokens, [5.0, 4.0, 4.5, 3.0, 3.5])
    assert noisy is not None and noisy.error > 0.1
    assert str(law).startswith("2.50 + 1.10 T^-0.40 (+- 0.00")


def test_a_law_of_sizes_is_found_again() -> None:
    grid = [(n * 1e6, t * 1e6) for n in (0.3, 0.8, 3.0) for t in (0.4, 0.8, 2.0)]
    nats = [2.0 + 0.5 * (n / 1e6) ** -0.3 + 0.9 * (t / 1e6) ** -0.5 for n, t in grid]
    law = curves.fit_sizes(*zip(*grid, strict=True), nats)
    assert law is not None and law.error < 1e-3 and law.limit == pytest.approx(2.0, abs=0.1)
    assert law.terms["N"] == pytest.approx((0.5, 0.3), abs=0.06)
    assert law.terms["T"] == pytest.approx((0.9, 0.5), abs=0.06)
    assert curves.fit_sizes(*zip(*grid[:6], strict=True), nats[:6]) is None  # two sizes


@pytest.mark.slow
def test_the_table_of_budgets(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two rungs at two budgets, through the real command."""
    extra = ["evaluate.samples=8", "data.seq_length=32", "model.bits=9", "optim.warmup_steps=1"]
    only = ["AR softmax", "chain K=4 g=8 binary"]
    main("small", tmp_path / "q", tiny_data, None, 1, 2, only, False, extra, True, ["512", "1024"])
    report = json.loads(capsys.readouterr().out)
    assert [(r["rung"], r["tokens"]) for r in report["results"]] == [(name, t) for name in only for t in (512, 1024)]
    first, second, other, last = (r["nats"] for r in report["results"])
    text = (tmp_path / "q" / "quality.md").read_text()
    assert "| rung | 0.000512 M | minus AR | 0.001024 M | minus AR | PFLOP of the last | law |" in text
    assert f"| {only[0]} | {first:.3f} |  | {second:.3f} |  |" in text
    assert f"| {only[1]} | {other:.3f} | {other - first:+.3f} | {last:.3f} | {last - second:+.3f} |" in text
    assert "optim.schedule=wsd" in report["results"][0]["settings"]
