"""Memory by itself; what it computes in a model is held to the reference in test_reference.py and test_softmax.py."""

from __future__ import annotations

import itertools

import torch

from megatron_bit.config import MemoryConfig
from megatron_bit.model.memory import NOTHING, begun_keys, make_memory, ngram_rows, token_keys


def test_keys_are_distinct_and_rows_evenly_used() -> None:
    values = torch.cartesian_prod(torch.arange(32), torch.arange(32))
    keys = token_keys(values)
    assert len(keys.unique()) == 1024 and len(begun_keys(values)[:, 0].unique()) == 32
    assert len(token_keys(torch.randint(0, 256, (5000, 32))).unique()) == 5000  # records of 256 bits

    memory = MemoryConfig(rows=64, orders=(1, 2), hashes=2)
    rows = ngram_rows(memory, keys[:, None], torch.full((1024, 1), 9))[:, 0]  # [1024, 4]
    for table in range(4):
        assert rows[:, table].min() >= 64 * table and rows[:, table].max() < 64 * (table + 1)
        counts = torch.bincount(rows[:, table] - 64 * table, minlength=64).float()
        assert ((counts - 16) ** 2 / 16).sum() < 120  # chi-square of 63: 120 has p < 1e-5
    for a, b in itertools.combinations(range(4), 2):  # tables agree as often as chance has it: 16 of 1,024
        assert (rows[:, a] % 64 == rows[:, b] % 64).sum() < 40


def test_an_ngram_is_its_tokens_in_their_order_and_no_more() -> None:
    memory = MemoryConfig(rows=2**30, orders=(2, 3))
    text = torch.tensor([1, 2, 3, 9, 1, 2, 3, 7, 2, 1, 2, 1])
    rows = ngram_rows(memory, token_keys(text[:, None])[:, None], torch.arange(1, 13)[:, None])[:, 0]
    assert rows[0].tolist() == [NOTHING] * 2 and rows[1, 0] != NOTHING and rows[1, 1] == NOTHING
    assert rows[1, 0] == rows[5, 0] == rows[10, 0] and rows[2, 1] == rows[6, 1]
    pairs = {(a, b) for a, b in itertools.pairwise(text.tolist())}
    assert len(rows[1:, 0].unique()) == len(pairs)  # (1, 2) is not (2, 1)
    begun = torch.tensor([[5], [6]])[:, None]
    inner = ngram_rows(memory, token_keys(text[:2, None])[:, None], torch.tensor([[0], [1]]), begun_keys_of(begun))
    assert (inner[0] == NOTHING).all() and inner[1, 0, 0, 0] != NOTHING and inner[1, 0, 0, 1] == NOTHING


def begun_keys_of(values: torch.Tensor) -> torch.Tensor:
    """Of values [S, b, 1] as the first of two groups."""
    return begun_keys(torch.cat((values, torch.zeros_like(values)), dim=-1))


def test_nothing_known_is_nothing_and_the_switch_is_one(groups, make_config, make_model) -> None:
    config = make_config(3, 5, "model.memory.rows=6")
    model = make_model(config)
    memory = model.embedding.memory
    assert memory.table.shape == (12, config.model.hidden_size)
    rows = torch.tensor([[[NOTHING, NOTHING]], [[0, 11]], [[NOTHING, 7]]])
    table = memory.table.detach()
    expected = torch.stack((torch.zeros_like(table[0]), table[0] + table[11], table[7]))[:, None]
    assert torch.equal(memory(rows).detach(), expected)
    assert make_model(make_config(3, 5)).embedding.memory is None
    assert make_memory(make_config(3, 5), None, groups.tp, 4) is None
