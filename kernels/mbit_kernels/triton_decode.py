"""Bit logits to the nearest valid token in Triton, without the scores of the vocabulary (plain form: decode.py).

The vocabulary is split over programs, so that a few rows fill a GPU too; each gives its best score and id, and the
first of the best is taken (torch.argmax says so): ties go to the smallest id, whatever the split.
"""

# what jit makes of a function is not what pyright sees
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbit_kernels.triton_tiles import rows_of

ROWS, CODES, SPLIT = 16, 128, 2048  # rows of a program, codes of a tile, codes of a program


@triton.jit
def _best(
    logits, table, score, token, rows, bits, codes, stride, ROWS: tl.constexpr, BITS: tl.constexpr,
    CODES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    bit = tl.arange(0, BITS)
    inside = (row < rows)[:, None] & (bit < bits)[None, :]
    x = tl.load(logits + row[:, None] * stride + bit[None, :], mask=inside, other=0.0).to(tl.float32)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    where = tl.zeros([ROWS], tl.int32)
    for i in range(SPLIT // CODES):
        first = tl.program_id(1) * SPLIT + i * CODES
        code = first + tl.arange(0, CODES)
        valid = code < codes
        at = code.to(tl.int64)[None, :] * bits + bit[:, None]
        c = tl.load(table + at, mask=valid[None, :] & (bit < bits)[:, None], other=0).to(tl.float32)
        scores = tl.where(valid[None, :], tl.dot(x, c, input_precision="ieee"), float("-inf"))
        largest = tl.max(scores, axis=1)
        here = tl.min(tl.where(scores == largest[:, None], code[None, :], 2147483647), axis=1)
        where = tl.where(largest > best, here, where)
        best = tl.maximum(best, largest)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(score + at, best, mask=row < rows)
    tl.store(token + at, where.to(tl.int64), mask=row < rows)


def nearest_token(logits: Tensor, table: Tensor) -> Tensor:
    """As `decode.nearest_token`; scores are float32 sums."""
    flat, table = rows_of(logits), table.contiguous()
    (rows, bits), codes = flat.shape, len(table)
    splits = triton.cdiv(codes, SPLIT)
    score = torch.empty(rows, splits, dtype=torch.float32, device=logits.device)
    token = torch.empty(rows, splits, dtype=torch.int64, device=logits.device)
    _best[(triton.cdiv(rows, ROWS), splits)](
        flat, table, score, token, rows, bits, codes, flat.stride(0), ROWS, max(16, triton.next_power_of_2(bits)),
        CODES, SPLIT, num_warps=4,
    )  # fmt: skip
    return token.gather(1, score.argmax(dim=1, keepdim=True)).view(logits.shape[:-1])
