"""Document boundaries in every layout: the single process's losses and weights, over samples of several documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
from gloo_ranks import run_ranks
from tiny_runs import Result

TOLERANCE = 1e-5
LAYOUTS = {
    "tp2_pp2": (4, {"parallel.tp": 2, "parallel.pp": 2}),
    "pp2_interleaved_recompute": (2, {"parallel.pp": 2, "parallel.vpp": 2, "parallel.recompute": "full"}),
    "tp2_dp2_zero3": (4, {"parallel.tp": 2, "parallel.zero_stage": 3}),
}
VARIANTS = {
    "chain": {
        "model.head.kind": "chain",
        "model.group_bits": 4,
        "data.document_boundaries": "mask",
        "data.align_blocks": True,
    },
    "joint": {
        "model.attention": "block_causal",
        "data.document_boundaries": "mask",
        "data.align_blocks": True,
    },
    "positions": {"model.head.kind": "chain", "data.document_boundaries": "positions"},
}


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of one line each: about three in a sample of 36 tokens."""
    import textwrap

    from mbit_data.prepare import PrepareOptions, prepare

    folder = tmp_path_factory.mktemp("short")
    lines = [line for line in Path(textwrap.__file__).read_text().splitlines() if line.strip()]
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    options = PrepareOptions((str(folder / "lines.jsonl"),), folder / "data", vocab_size=421, workers=1)
    prepare(options, progress=False)
    return folder / "data"


@pytest.fixture(scope="module")
def single(short_documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """The single process's result for a set of settings; computed once for each."""
    known: dict[str, Result] = {}

    def run(**settings: object) -> Result:
        key = repr(sorted(settings.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("single") / "run"
            run_ranks(tiny_runs.train, 1, tiny_runs.overrides(folder, short_documents, settings))
            known[key] = tiny_runs.read(folder)
        return known[key]

    return run


@pytest.mark.parametrize(
    ("layout", "variant"),
    [*((layout, variant) for layout in LAYOUTS for variant in ("chain", "joint")), ("tp2_pp2", "positions")],
)
def test_layouts_agree(
    layout: str, variant: str, single: Callable[..., Result], short_documents: Path, tmp_path: Path
) -> None:
    (world, settings), switches = LAYOUTS[layout], VARIANTS[variant]
    run_ranks(tiny_runs.train, world, tiny_runs.overrides(tmp_path / "run", short_documents, {**settings, **switches}))
    result, reference = tiny_runs.read(tmp_path / "run"), single(**switches)
    assert result.loss == pytest.approx(reference.loss, abs=TOLERANCE)
    assert result.bound == pytest.approx(reference.bound, rel=TOLERANCE)
    assert tiny_runs.worst(result.weights, reference.weights)[0] < TOLERANCE
    ignored = single(**{**switches, "data.document_boundaries": "ignore"})
    assert max(abs(a - b) for a, b in zip(reference.loss, ignored.loss, strict=True)) > 1e-3
