"""Attention under a mask on a GPU: torch's FlexAttention, whose kernels skip what the mask hides.

A dense mask there would cost O(S^2) memory traffic and rule out the fused kernels. On a CPU FlexAttention has no
backward pass, so that SDPA with a dense mask serves (model/attention.py); a test holds the two together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class MaskedAttention:
    """Causal or block-causal attention, if asked for inside a document only. One for all layers: it keeps the mask."""

    def __init__(self, block_size: int | None, masked: bool, device: torch.device) -> None:
        """
        Args:
            block_size: tokens that see each other both ways; None: one.
            masked: hide other documents than the token's own.
        """
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = device.type == "cuda"
        self._block, self._masked = block_size or 1, masked
        self._attend: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
        self._create: Any = torch.compile(create_block_mask, dynamic=False) if compiled else create_block_mask
        self._last: tuple[Tensor | None, int] = (None, 0)
        self._mask: Any = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, scale: float | None) -> Tensor:
        """q [b, heads, S, d], k and v [b, kv_heads, S, d] to [b, heads, S, d].

        start: int64 [b, S], where each position's document begins; looked at if `masked`.
        """
        mask = self._of(start if self._masked else None, q.shape[2], q.device)
        return self._attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=k.shape[1] != q.shape[1])

    def _of(self, start: Tensor | None, length: int, device: torch.device) -> Any:
        """The mask of a micro-batch, made by the first layer that asks."""
        if self._mask is None or self._last[0] is not start or self._last[1] != length:
            block = self._block

            def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return key // block <= query // block

            def sees_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
                assert start is not None
                return (key // block <= query // block) & (key >= start[b, query])

            batch, mod = (None, sees) if start is None else (len(start), sees_document)
            self._mask = self._create(mod, batch, None, length, length, device=device)
            self._last = (start, length)
        return self._mask
