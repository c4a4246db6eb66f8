"""split_layers: all layers, the best slowest chunk, and no chunk without work."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bit.config import Config, load_config
from megatron_bit.parallel.split import embedding_flops, head_flops, layer_flops, split_layers


def _config(layers: int, head_layers: int = 1, noise: int = 4, hidden: int = 64) -> Config:
    return load_config(
        None,
        [
            f"model.num_layers={layers}",
            f"model.head.num_layers={head_layers}",
            f"diffusion.noise_samples={noise}",
            f"model.hidden_size={hidden}",
            "model.num_heads=4",
            "model.num_kv_heads=4",
        ],
    )


def _costs(config: Config, counts: tuple[int, ...] | list[int]) -> list[float]:
    costs = [layer_flops(config) * count for count in counts]
    costs[0] += embedding_flops(config)
    costs[-1] += head_flops(config)
    return costs


def _splits(layers: int, chunks: int) -> list[tuple[int, ...]]:
    """All splits in which only the last chunk may be empty."""
    return [
        (*counts, layers - sum(counts))
        for counts in itertools.product(range(1, layers + 1), repeat=chunks - 1)
        if sum(counts) <= layers
    ]


CASES = st.integers(1, 4).flatmap(
    lambda chunks: st.tuples(
        st.just(chunks),
        st.integers(max(1, chunks - 1), 9),
        st.integers(1, 6),
        st.sampled_from((1, 2, 4, 16)),
        st.sampled_from((32, 64, 256, 1024)),
    )
)


@given(CASES)
@settings(max_examples=150, deadline=None)
def test_the_slowest_chunk_is_as_fast_as_it_can_be(case: tuple[int, int, int, int, int]) -> None:
    chunks, layers, head_layers, noise, hidden = case
    config = _config(layers, head_layers, noise, hidden)
    counts = split_layers(config, chunks)
    assert len(counts) == chunks
    assert sum(counts) == layers
    assert all(count > 0 for count in counts[:-1])
    best = min(max(_costs(config, split)) for split in _splits(layers, chunks))
    assert max(_costs(config, counts)) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("chunks", "layers"), [(2, 1), (4, 3), (8, 7)])
def test_with_one_layer_less_than_chunks_the_head_is_alone(chunks: int, layers: int) -> None:
    assert split_layers(_config(layers), chunks) == [1] * layers + [0]


def test_a_heavy_head_gets_fewer_layers_and_a_light_one_its_share() -> None:
    heavy = split_layers(_config(12, head_layers=6, noise=16), 4)
    assert heavy[-1] < min(heavy[:-1])
    light = split_layers(_config(12, head_layers=1, noise=1, hidden=2048), 4)
    assert light == [3, 3, 3, 3]
