"""The attention seam: one module that megatron-core's layer calls with queries, keys and values.

SDPA serves everywhere. A GPU path (FlexAttention, TE) takes its place here, behind the same call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def block_causal_mask(length: int, block_size: int, device: torch.device) -> Tensor:
    """bool [length, length], True where the query (row) may see the key: every token of its own and earlier blocks."""
    block = torch.arange(length, device=device) // block_size
    return block[:, None] >= block[None, :]


class RotaryEmbedding:
    """RoPE, channel i turned together with channel i + d/2; the table is made once for a length and device.

    megatron-core would apply its own before it calls us, with two more copies of queries and keys in each layer.
    """

    def __init__(self, base: float) -> None:
        self.base = base
        self._table: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[s, b, heads, d], positions 0 to s - 1, same shape out."""
        cos, sin = self._cos_sin(x)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def _cos_sin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        length, half = x.shape[0], x.shape[-1] // 2
        table = self._table
        if table is None or table[0].shape[0] != length or table[0].device != x.device or table[0].dtype != x.dtype:
            frequency = self.base ** -(torch.arange(half, dtype=torch.float64) / half)
            angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)[:, None, None, :]
            table = self._table = (angle.cos().to(x.device, x.dtype), angle.sin().to(x.device, x.dtype))
        return table


class CoreAttention(nn.Module):
    """Attention of the heads this rank holds.

    Built by megatron-core through the layer spec; `rope` and `block_size` (None for causal attention) come from the
    spec's `functools.partial`. The mask is made here rather than passed in: a mask argument breaks recomputation.
    """

    def __init__(
        self,
        config: Any,
        *,
        rope: RotaryEmbedding,
        block_size: int | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.block_size = block_size
        self.rope = rope
        self._mask: Tensor | None = None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, kv_heads, d] to [s, b, heads * d]."""
        assert attention_mask is None and len(query) == len(key), "the seam makes its own mask, over equal lengths"
        q, k, v = (t.permute(1, 2, 0, 3) for t in (self.rope(query), self.rope(key), value))
        mask = None if self.block_size is None else self._block_mask(q.shape[2], q.device)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _block_mask(self, length: int, device: torch.device) -> Tensor:
        assert self.block_size is not None
        if self._mask is None or self._mask.shape[0] != length or self._mask.device != device:
            self._mask = block_causal_mask(length, self.block_size, device)
        return self._mask
