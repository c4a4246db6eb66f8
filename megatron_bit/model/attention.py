"""The attention seam: one module that megatron-core's layer calls with queries, keys and values.

Without a mask torch's SDPA serves everywhere, on a GPU by FlashAttention or cuDNN. Under a mask: on a GPU FlexAttention
(model/flex.py), elsewhere SDPA with a dense one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bit.model.flex import MaskedAttention


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

    def __call__(self, x: Tensor, position: Tensor | None = None, length: int | None = None) -> Tensor:
        """[s, b, heads, d], same shape out. position: int64 [s, b], below `length`; None: 0 to s - 1. length: s."""
        cos, sin = self._cos_sin(x, length or x.shape[0])
        if position is not None:
            cos, sin = cos[position, 0], sin[position, 0]
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def _cos_sin(self, x: Tensor, length: int) -> tuple[Tensor, Tensor]:
        half = x.shape[-1] // 2
        table = self._table
        if table is None or table[0].shape[0] != length or table[0].device != x.device or table[0].dtype != x.dtype:
            frequency = self.base ** -(torch.arange(half, dtype=torch.float64) / half)
            angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)[:, None, None, :]
            table = self._table = (angle.cos().to(x.device, x.dtype), angle.sin().to(x.device, x.dtype))
        return table


class CoreAttention(nn.Module):
    """Attention of the heads this rank holds.

    Built by megatron-core through the layer spec; `rope`, `block_size` (None for causal attention), `masked` (hide
    other documents) and `flex` (what attends under a mask, if not SDPA) come from the spec's `functools.partial`. The
    mask is made here, from where documents begin.
    """

    def __init__(
        self,
        config: Any,
        *,
        rope: RotaryEmbedding,
        block_size: int | None = None,
        masked: bool = False,
        flex: MaskedAttention | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.block_size = block_size
        self.masked = masked
        self.flex = flex
        self.rope = rope
        self._mask: Tensor | None = None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, kv_heads, d] to [s, b, heads * d].

        attention_mask: int64 [b, s], no mask but where each position's document begins; None: there is one.
        """
        assert len(query) == len(key), "the seam makes its own mask, over equal lengths"
        start, position, mask = attention_mask, None, None
        if start is not None:
            position = (torch.arange(len(query), device=start.device) - start).t()
        q, k, v = (t.permute(1, 2, 0, 3) for t in (self.rope(query, position), self.rope(key, position), value))
        if self.flex is not None:
            return self.flex(q, k, v, start, self.scale).permute(2, 0, 1, 3).flatten(2)
        if start is not None and self.masked:
            seen = self._seen(q.shape[2], q.device)
            mask = (seen & (torch.arange(q.shape[2], device=q.device) >= start[..., None]))[:, None]
        elif self.block_size is not None:
            mask = self._seen(q.shape[2], q.device)
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

    def _seen(self, length: int, device: torch.device) -> Tensor:
        """bool [length, length]: what a query may see of one document."""
        if self._mask is None or self._mask.shape[0] != length or self._mask.device != device:
            self._mask = block_causal_mask(length, self.block_size or 1, device)
        return self._mask
