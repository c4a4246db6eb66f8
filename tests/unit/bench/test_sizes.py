"""Sizes of `bench quality`: one rule for width, initial weights and learning rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_bit.bench.ladder import other_parameters
from megatron_bit.bench.quality import main
from megatron_bit.bench.sizes import LR_POWER, SIZES, of_width, sizes
from megatron_bit.config import load_config
from megatron_bit.errors import UserError


@pytest.mark.parametrize("budget", SIZES)
def test_the_own_width_changes_nothing_and_four_times_it_what_the_rule_says(budget: str) -> None:
    base = load_config(preset="laptop", overrides=SIZES[budget])
    assert load_config(preset="laptop", overrides=[*SIZES[budget], *of_width(budget, base.model.hidden_size)]) == base
    wide = load_config(preset="laptop", overrides=[*SIZES[budget], *of_width(budget, 4 * base.model.hidden_size)])
    assert wide.model.hidden_size == wide.model.head.hidden_size == 4 * base.model.hidden_size
    assert wide.model.ffn_hidden_size == 4 * (base.model.ffn_hidden_size or 0)
    assert wide.model.init_std == pytest.approx(base.model.init_std / 2)
    assert wide.optim.lr == pytest.approx(base.optim.lr * 4**-LR_POWER, rel=1e-3)
    kept = ("num_layers", "num_heads")
    assert all(getattr(wide.model, key) == getattr(base.model, key) for key in kept)


def test_sizes_are_those_of_the_nearest_widths() -> None:
    common = ("model.bits=10",)
    found = sizes("small", ["3M", "0.3M", "0.76M"], common, ["optim.lr=1e-3"], 1024)
    assert [size.target.model.hidden_size for size in found] == [64, 96, 192]
    assert [size.parameters for size in found] == pytest.approx([0.3e6, 0.76e6, 3e6], rel=0.2)
    assert all(size.target.optim.lr == 1e-3 for size in found)  # what the user says goes before the rule
    assert all(size.parameters == other_parameters(size.target) for size in found)
    for wanted, named in ((["0.3M", "0.31M"], "0.31M"), (["1k"], "1k")):
        with pytest.raises(UserError, match=f"--sizes {named}: the nearest width gives"):
            sizes("small", wanted, common, [], 1024)
    with pytest.raises(UserError, match="--sizes 3MB is no number"):
        sizes("small", ["3MB"], common, [], 1024)


@pytest.mark.slow
def test_every_size_is_trained_with_its_own_rate(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the real command."""
    settings = ["evaluate.samples=8", "data.seq_length=32", "model.bits=9", "log.every=1", "optim.warmup_steps=0"]
    only = ["AR softmax", "chain K=4 g=8 binary"]
    main("small", tmp_path, tiny_data, 2, 1, 2, only, False, settings, True, wanted_sizes=["0.1M", "0.3M"])
    results = json.loads(capsys.readouterr().out)["results"]
    assert [(r["rung"], r["size"] // 100_000) for r in results] == [(name, n) for n in (0, 3) for name in only]
    assert all(abs(r["parameters"]["rest"] - r["size"]) < 0.02 * r["size"] for r in results)
    for width in (32, 64):
        log = (tmp_path / "runs" / f"ar-softmax-w{width}-0" / "log.jsonl").read_text().splitlines()
        assert json.loads(log[0])["lr"] == pytest.approx(6e-3 * (96 / width) ** LR_POWER, rel=1e-3)
    table = (tmp_path / "quality.md").read_text()
    assert [f"**{size:,} parameters outside of tables**" in table for size in {r["size"] for r in results}] == [
        True
    ] * 2
