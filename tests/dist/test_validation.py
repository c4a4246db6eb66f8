"""Validation is of exactly the samples that were asked for, and the same number in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from gloo_ranks import run_ranks

HEADS: dict[str, dict[str, Any]] = {
    "diffusion": {"diffusion.self_condition": 0.5},
    "chain": {"model.head.kind": "chain", "model.group_bits": 5},
    "softmax": {"model.head.kind": "softmax", "model.block_size": 1},
}
# ranks, micro-batch and layout; 11 samples are no multiple of any of them
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "micro-batch 4": (1, {"train.micro_batch_size": 4}),
    "more than there are": (1, {"train.micro_batch_size": 16, "train.global_batch_size": 16}),
    "dp 2": (2, {"train.micro_batch_size": 2}),
    "dp 3, ZeRO-3": (3, {"train.micro_batch_size": 2, "train.global_batch_size": 12, "parallel.zero_stage": 3}),
    "tp 2 x pp 2": (4, {"parallel.tp": 2, "parallel.pp": 2, "train.micro_batch_size": 4}),
    "interleaved, dp 2": (
        4,
        {"parallel.pp": 2, "parallel.vpp": 2, "train.micro_batch_size": 2, "train.global_batch_size": 8},
    ),
}


def _validated(run: Path, data: Path, world: int = 1, **settings: Any) -> list[dict[str, Any]]:
    arguments = tiny_runs.overrides(
        run, data, {"evaluate.every": 1, "evaluate.samples": 11, "train.steps": 1, **settings}
    )
    assert set(run_ranks(tiny_runs.train, world, arguments)) == {0}
    return [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=HEADS)
def reference(
    request: pytest.FixtureRequest, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    """The untrained model of a head, validated one sample at a time."""
    run = tmp_path_factory.mktemp("reference") / "run"
    return request.param, _validated(run, tiny_data, **HEADS[request.param])[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_number_in_every_layout(
    name: str, reference: tuple[str, dict[str, Any]], tiny_data: Path, tmp_path: Path
) -> None:
    head, alone = reference
    world, settings = LAYOUTS[name]
    found = _validated(tmp_path / "run", tiny_data, world, **HEADS[head], **settings)[0]
    assert found["samples"] == alone["samples"] == 11
    for key in ("nats_per_token_bound", "standard_error"):
        assert found[key] == pytest.approx(alone[key], abs=1e-6), key
    for key in ("nats_by_place", "nats_by_group"):
        assert found[key] == pytest.approx(alone[key], abs=1e-6), key
    by_place, by_group = alone["nats_by_place"], alone["nats_by_group"]
    places = 1 if head == "softmax" else 3
    assert len(by_place) == places and len(by_group) == {"diffusion": 9, "chain": 2, "softmax": 1}[head]
    assert sum(by_place) / places == pytest.approx(alone["nats_per_token_bound"], rel=1e-9)
    assert sum(by_group) == pytest.approx(alone["nats_per_token_bound"], rel=1e-9)


def test_no_more_than_the_split_has(tiny_data: Path, tmp_path: Path) -> None:
    """Each of its samples once, though the last micro-batch goes on behind them."""
    from megatron_bit.data.corpus import Corpus
    from megatron_bit.data.manifest import load_manifest
    from megatron_bit.data.samples import Samples

    corpus = Corpus.of(load_manifest(tiny_data))
    there = Samples(corpus, "validation", seq_length=36, seed=0, shuffle_shards=8, shuffle=False).before_repeat
    size = next(n for n in range(5, 64) if there % n)
    settings = {"evaluate.samples": 10**6, "train.micro_batch_size": size, "train.global_batch_size": size}
    assert _validated(tmp_path / "run", tiny_data, **settings)[0]["samples"] == there


def test_it_is_what_evaluate_says(tiny_data: Path, tmp_path: Path) -> None:
    """At every number of samples: the mean of the first ones, as an evaluation takes them."""
    from megatron_bit.evaluation.likelihood import measure
    from megatron_bit.evaluation.loading import open_model
    from megatron_bit.evaluation.validation import Validation

    chain = {**HEADS["chain"], "train.micro_batch_size": 4}
    last = _validated(tmp_path / "run", tiny_data, **chain)[-1]
    model = open_model(tmp_path / "run")
    again = measure(
        model, Validation(model, tiny_data), samples=11, tolerance=1.0, max_passes=2, seed=0, batch_size=3
    )
    assert again.nats_per_token == pytest.approx(last["nats_per_token_bound"], abs=1e-5)
    assert again.standard_error == pytest.approx(last["standard_error"], rel=1e-4)
