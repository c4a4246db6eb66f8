"""Raw binary records from files to weights: `prepare --raw-bits`, `train model.code=raw`, over layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from gloo_ranks import run_ranks

BITS = 70


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of a counter and of noise: what follows can be told in part."""
    from mbit_data.raw import RawOptions, prepare_raw

    folder = tmp_path_factory.mktemp("records")
    bits = np.random.default_rng(0).integers(0, 2, (6000, BITS), dtype=np.uint8)
    bits[:, :40] = np.unpackbits(np.arange(6000, dtype=">u8").view(np.uint8).reshape(-1, 8), axis=1)[:, 24:]
    (folder / "feed.bin").write_bytes(np.packbits(bits, axis=1).tobytes())
    options = RawOptions((str(folder / "feed.bin"),), folder / "data", BITS, document_records=50, validation_fraction=0.1, shard_tokens=900)
    return prepare_raw(options, progress=False).folder


@pytest.mark.parametrize(
    ("model", "layouts"),
    [
        ({"model.group_bits": 8, "model.head.kind": "chain"}, ("tp2_pp2", "dp2_zero2")),
        ({"diffusion.self_condition": 0.5}, ("tp2_sp",)),
    ],
    ids=["chain", "diffusion"],
)
def test_parity(model: dict[str, object], layouts: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    settings = {"model.code": "raw", "model.bits": BITS, "evaluate.samples": 6, "evaluate.every": 5, **model}
    known = {
        "tp2_pp2": (4, {"parallel.tp": 2, "parallel.pp": 2}),
        "dp2_zero2": (2, {"parallel.zero_stage": 2}),
        "tp2_sp": (2, {"parallel.tp": 2, "parallel.sequence_parallel": True}),
    }
    results = {}
    for name in ("single", *layouts):
        world, layout = known.get(name, (1, {}))
        run = tmp_path / name
        codes = run_ranks(tiny_runs.train, world, tiny_runs.overrides(run, data, {**settings, **layout}))
        assert codes == [0] * world
        results[name] = tiny_runs.read(run)
    single = results.pop("single")
    assert 0.5 * BITS * np.log(2) < single.bound[0] < 40 * BITS
    for result in results.values():
        assert result.loss == pytest.approx(single.loss, abs=1e-5)
        assert result.bound == pytest.approx(single.bound, rel=1e-5)
        assert tiny_runs.worst(result.weights, single.weights)[0] < 1e-5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, f"holds records of {BITS} bits, and model.code is binary with 9 bits; set model.code=raw model.bits={BITS}"),
        ({"model.code": "raw"}, f"and model.code is raw with 9 bits; set model.code=raw model.bits={BITS}"),
        ({"model.head.kind": "softmax", "model.block_size": 1}, "no vocabulary, and model.head.kind=softmax needs one"),
    ],
)
def test_another_model_is_refused(settings: dict[str, object], said: str, data: Path, tmp_path: Path) -> None:
    overrides = tiny_runs.overrides(tmp_path / "run", data, settings)
    with pytest.raises(AssertionError, match=said):
        run_ranks(tiny_runs.train, 2, overrides)
    assert not (tmp_path / "run").exists()


def test_tokens_of_a_vocabulary_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    settings = {"model.code": "raw", "model.bits": 16}
    with pytest.raises(AssertionError, match=r"model.code is raw, and .* `megatron-bit prepare --raw-bits 16`"):
        run_ranks(tiny_runs.train, 1, tiny_runs.overrides(tmp_path / "run", tiny_data, settings))
