"""The attention seam: SDPA with a dense mask, FlexAttention, and every weight by hand.

FlexAttention has no backward pass on a CPU; scripts/gpu_check.py holds gradients together on a GPU.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_bit.model.attention import CoreAttention, RotaryEmbedding
from megatron_bit.model.flex import MaskedAttention

CPU = torch.device("cpu")


class NoRotation(RotaryEmbedding):
    """Positions do not matter, so that the reference needs none."""

    def __call__(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        return x


def by_hand(q: Tensor, k: Tensor, v: Tensor, block: int, start: Tensor | None) -> Tensor:
    """[s, b, h, d] to [s, b, h d], one query at a time, in float64."""
    length, batch, heads, width = q.shape
    share = heads // k.shape[2]
    out = torch.zeros(length, batch, heads, width, dtype=torch.float64)
    for i in range(length):
        for j in range(batch):
            first = 0 if start is None else int(start[j, i])
            keys = [p for p in range(first, length) if p // block <= i // block]
            for h in range(heads):
                logits = torch.stack([q[i, j, h].double() @ k[p, j, h // share].double() for p in keys])
                weights = torch.softmax(logits / math.sqrt(width), 0)
                out[i, j, h] = sum(w * v[p, j, h // share].double() for w, p in zip(weights, keys, strict=True))
    return out.flatten(2)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("block", "length", "kv_heads"), [(None, 21, 4), (3, 21, 2), (4, 130, 1)])
def test_masks(block: int | None, length: int, kv_heads: int, documents: bool) -> None:
    if block is None and not documents:
        pytest.skip("no mask: SDPA alone")
    torch.manual_seed(0)
    q, k, v = (torch.randn(length, 2, heads, 16) for heads in (4, kv_heads, kv_heads))
    start = None
    if documents:  # the second sample has three, the first one
        begins = [[0], [0, 8, 16] if block in (None, 4) else [0, 6, 15]]
        start = torch.tensor([[max(s for s in row if s <= p) for p in range(length)] for row in begins])
    config, rope = SimpleNamespace(), NoRotation(1e4)
    dense = CoreAttention(config, rope=rope, block_size=block, masked=documents)
    flex = CoreAttention(
        config, rope=rope, block_size=block, masked=documents, flex=MaskedAttention(block, documents, CPU)
    )
    expected = by_hand(q, k, v, block or 1, start).float()
    with torch.no_grad():
        torch.testing.assert_close(dense(q, k, v, start), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(flex(q, k, v, start), expected, rtol=1e-5, atol=1e-5)


def test_the_mask_is_that_of_the_micro_batch() -> None:
    """It is kept for the layers of one micro-batch, and made anew for the next."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(12, 1, 2, 16) for _ in range(3))
    flex = MaskedAttention(None, True, CPU)
    layers = [
        CoreAttention(SimpleNamespace(), rope=NoRotation(1e4), masked=True, flex=given) for given in (flex, flex, None)
    ]
    whole, halves = torch.zeros(1, 12, dtype=torch.int64), torch.tensor([[0] * 5 + [5] * 7])
    with torch.no_grad():
        for start in (whole, halves, whole):
            kept = None
            for layer in layers[:2]:
                torch.testing.assert_close(layer(q, k, v, start), layers[2](q, k, v, start), rtol=1e-5, atol=1e-5)
                assert kept is None or flex._mask is kept
                kept = flex._mask
