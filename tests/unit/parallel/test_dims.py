"""ParallelDims: every rank has one place, and what does not fit is refused with what would."""

from __future__ import annotations

import itertools

import pytest

from megatron_bit.config import Config, load_config
from megatron_bit.errors import UserError
from megatron_bit.parallel.dims import ParallelDims, divisors

BASE = [
    "model.num_layers=8",
    "model.num_heads=8",
    "model.num_kv_heads=4",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.head.num_heads=4",
    "model.head.hidden_size=64",
    "model.head.ffn_hidden_size=96",
    "model.block_size=4",
    "data.seq_length=64",
    "train.global_batch_size=48",
    "train.micro_batch_size=1",
]


def _config(*settings: str) -> Config:
    return load_config(None, [*BASE, *settings])


@pytest.mark.parametrize(("tp", "pp", "dp"), itertools.product((1, 2, 4), (1, 2, 3), (1, 2, 3)))
def test_coordinates_cover_every_rank_once(tp: int, pp: int, dp: int) -> None:
    dims = ParallelDims.build(_config(f"parallel.tp={tp}", f"parallel.pp={pp}"), tp * pp * dp)
    assert (dims.tp, dims.pp, dims.dp, dims.world_size) == (tp, pp, dp, tp * pp * dp)
    places = [dims.coordinates(rank) for rank in range(dims.world_size)]
    assert sorted(places) == list(itertools.product(range(pp), range(dp), range(tp)))
    assert places == sorted(places)  # tensor-parallel innermost, then data, then pipeline
    assert dims.micro_batches(_config()) * dp == 48


@pytest.mark.parametrize(
    ("settings", "world", "parts"),
    [
        (["parallel.tp=4"], 6, ["tp 4 x parallel.pp 1 = 4", "world size 6", "start 8 ranks", "tp=1 pp=1", "tp=2 pp=3"]),
        (["parallel.tp=2", "parallel.pp=2"], 2, ["= 4 ", "world size 2", "start 4 ranks", "tp=2 pp=1", "tp=1 pp=2"]),
        (["parallel.tp=16", "model.head.num_heads=16"], 16, ["model.num_heads 8", "tp 16", "[1, 2, 4, 8]"]),
        (["parallel.tp=8", "model.head.num_heads=8"], 8, ["model.num_kv_heads 4", "tp 8", "[1, 2, 4]"]),
        (["parallel.tp=4", "model.ffn_hidden_size=90"], 4, ["model.ffn_hidden_size 90", "tp 4"]),
        (["parallel.tp=4", "model.head.num_heads=2"], 4, ["model.head.num_heads 2", "[1, 2]"]),
        (["parallel.tp=4", "model.head.ffn_hidden_size=90"], 4, ["model.head.ffn_hidden_size 90"]),
        (
            ["parallel.tp=2", "data.seq_length=68"],
            2,
            ["data.seq_length 68", "= 8 ", "sequence_parallel=false"],
        ),
        (
            ["train.global_batch_size=4"],
            3,
            ["global_batch_size 4", "micro_batch_size 1", "size 3 = 3", "example 6"],
        ),
        (["parallel.pp=10"], 10, ["model.num_layers 8", "parallel.pp 10", "10 chunks", "at most 9"]),
        (["parallel.pp=2", "parallel.vpp=5"], 2, ["model.num_layers 8", "10 chunks", "at most 9"]),
        (
            ["parallel.pp=2", "parallel.vpp=2", "train.global_batch_size=3"],
            2,
            ["multiple of parallel.pp 2", "there are 3", "train.global_batch_size", "vpp=1"],
        ),
        ([], 0, ["world size 0"]),
        ([], -1, ["world size -1"]),
    ],
)
def test_what_does_not_fit(settings: list[str], world: int, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        ParallelDims.build(_config(*settings), world)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_the_layouts_it_offers_fit() -> None:
    with pytest.raises(UserError) as caught:
        ParallelDims.build(_config("parallel.tp=4"), 6)
    offered = str(caught.value).partition("use one of: ")[2].split(", ")
    assert offered
    for layout in offered:
        tp, pp = (int(word.partition("=")[2]) for word in layout.split())
        ParallelDims.build(_config(f"parallel.tp={tp}", f"parallel.pp={pp}"), 6)


def test_sequence_parallel_is_off_without_tp_and_by_request() -> None:
    assert not ParallelDims.build(_config(), 1).sequence_parallel
    assert ParallelDims.build(_config("parallel.tp=2"), 2).sequence_parallel
    off = ["parallel.tp=2", "parallel.sequence_parallel=false", "data.seq_length=68"]
    assert not ParallelDims.build(_config(*off), 2).sequence_parallel


def test_text() -> None:
    dims = ParallelDims.build(_config("parallel.tp=2", "parallel.pp=2", "parallel.vpp=2"), 8)
    assert str(dims) == "TP=2 PP=2 DP=2 VPP=2 SP"
    assert dims.num_chunks == 4


def test_divisors() -> None:
    assert all(divisors(n) == [d for d in range(1, n + 1) if n % d == 0] for n in (1, 2, 9, 12, 36, 97, 360))
    assert len(divisors(2**24)) == 25


def test_noisy_blocks_have_sizes_that_fp8_accepts() -> None:
    """As many rows on each rank: 2 of 8 blocks each, and with one in seven of 16 blocks 2 on the first rank of two."""
    base = ["train.precision=fp8_emulated", "fp8.recipe=mxfp8", "data.seq_length=64", "train.micro_batch_size=4"]
    for every, world, size in ((4, 1, 64), (4, 2, 32), (8, 2, 16), (7, 2, 32)):
        settings = [*base, f"diffusion.noisy_every={every}", f"parallel.tp={world}", "parallel.zero_stage=0"]
        config = load_config(preset="laptop", overrides=settings)
        if size % 32:
            with pytest.raises(UserError, match=f"noisy_every {every} has {size} tokens .* a multiple of 32; change"):
                ParallelDims.build(config, world)
        else:
            ParallelDims.build(config, world)
