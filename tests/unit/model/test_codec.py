"""Codes: ids to bits and back."""

import pytest
import torch
from mbit_kernels.decode import nearest_token

from megatron_bit.errors import UserError
from megatron_bit.model.codec import Codec


@pytest.mark.parametrize("code", ["binary", "gray", "random"])
@pytest.mark.parametrize(
    ("vocab_size", "bits"), [(1, 1), (2, 1), (3, 2), (37, 6), (1999, 11), (1999, 12), (301, 40), (301, 62)]
)
def test_round_trip(code, vocab_size, bits):
    codec = Codec(code, vocab_size, bits)
    ids = torch.arange(vocab_size).flip(0)
    encoded = codec.encode(ids)
    assert encoded.dtype == torch.int8 and encoded.shape == (vocab_size, bits)
    assert set(encoded.unique().tolist()) <= {-1, 1}
    assert len(encoded.unique(dim=0)) == vocab_size, "two ids share a code"
    assert torch.equal(codec.decode(encoded.float() * 0.1), ids)


def test_binary_and_gray_digits():
    """The most significant digit comes first; neighbours in Gray code differ in one digit."""
    assert Codec("binary", 7, 3).encode(torch.tensor(6)).tolist() == [1, 1, -1]
    gray = Codec("gray", 1999, 11).table
    assert ((gray[1:] != gray[:-1]).sum(-1) == 1).all()
    assert torch.equal(Codec("binary", 37, 9).table[:, 3:], Codec("binary", 37, 6).table)


def test_random_code_is_fixed_and_unordered():
    first, second = Codec("random", 1000, 10), Codec("random", 1000, 10)
    assert torch.equal(first.table, second.table) and first.fingerprint == second.fingerprint
    distance = (first.table[1:] != first.table[:-1]).float().sum(-1).mean()
    assert 4.5 < distance < 5.5  # independent codes of 10 digits differ in 5; binary neighbours in 2
    assert first.fingerprint != Codec("binary", 1000, 10).fingerprint


@pytest.mark.parametrize(
    ("vocab_size", "bits", "needed"), [(4, 1, 2), (5, 2, 3), (2048, 10, 11), (2049, 11, 12), (65537, 16, 17)]
)
def test_too_few_bits_is_refused_with_the_right_number(vocab_size, bits, needed):
    with pytest.raises(
        UserError, match=rf"model\.bits {bits} .*vocabulary of {vocab_size} .*set model\.bits={needed}$"
    ):
        Codec("binary", vocab_size, bits)
    Codec("binary", vocab_size, needed)
    Codec("binary", 2**bits, bits)


def test_nearest_token_against_brute_force():
    """61 of 64 codes are valid, so that the sign pattern alone is often no token."""
    codec = Codec("gray", 37, 6)
    logits = torch.randn(5, 67, 6, generator=torch.Generator().manual_seed(0)) * 3
    scores = (logits[..., None, :] * codec.table.float()).sum(-1) / 2
    expected = scores.argmax(-1)
    assert torch.equal(nearest_token(logits, codec.table, rows_at_once=13), expected)
    assert torch.equal(codec.decode(logits), expected)
    signs = torch.where(logits > 0, 1, -1)
    assert (codec.encode(expected) != signs).any(-1).float().mean() > 0.2, "invalid codes were not exercised"


def test_nearest_token_is_the_posterior_mode():
    """With independent bits of these log-odds, the most probable of the valid codes."""
    codec = Codec("binary", 11, 4)
    logits = torch.randn(200, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    log_p = torch.nn.functional.logsigmoid(codec.table.double() * logits[:, None, :]).sum(-1)
    assert torch.equal(codec.decode(logits), log_p.argmax(-1))


def test_ties_go_to_the_smallest_id_and_dtypes():
    table = Codec("binary", 37, 6).table
    assert nearest_token(torch.zeros(3, 6), table).tolist() == [0, 0, 0]
    decoded = nearest_token(torch.zeros(2, 3, 6, dtype=torch.bfloat16), table)
    assert decoded.dtype == torch.int64 and decoded.shape == (2, 3)
