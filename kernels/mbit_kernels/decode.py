"""Bit logits to the nearest valid token: argmax over the code table, in pieces of bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_token(logits: Tensor, table: Tensor, rows_at_once: int = 1024) -> Tensor:
    """argmax_v sum_j c_vj logit_j / 2 over the valid codes; ties go to the smallest id.

    Args:
        logits: float [..., B], log-odds of every bit being +1.
        table: int8 [V, B] of -1 and +1.
        rows_at_once: rows of logits scored together; peak memory is rows_at_once * V floats.

    Returns:
        int64 [...], token ids.
    """
    flat = logits.reshape(-1, logits.shape[-1]).float()
    codes = table.t().float()
    parts = [(chunk @ codes).argmax(dim=-1) for chunk in flat.split(rows_at_once)]
    return torch.cat(parts).reshape(logits.shape[:-1])
