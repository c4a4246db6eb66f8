"""Nats of texts of any length, in batches, and of the tokens of a text behind its context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_bit.evaluation.models import Model
from megatron_bit.evaluation.progress import Progress
from megatron_bit.inference.hf.text_bitlm import common


class Window(NamedTuple):
    """Tokens begin .. end - 1 of a row are read, and those from `counted` on are scored."""

    begin: int
    end: int
    counted: int


def windows(length: int, block_size: int, context: int) -> list[Window]:
    """How a row is read that may be longer than the context: each window is moved on by half a context.

    So no token is scored with less than half a context before it, but for those of the first window, and where a
    window begins depends on the tokens before it only. The first one is shorter by the tokens that fill it up in front
    to whole blocks; all others are whole blocks.
    """
    fill = -length % block_size
    hop = max(1, context // block_size // 2) * block_size
    out = [Window(0, min(length, context - fill), 0)]
    while out[-1].end < length:
        begin = len(out) * hop - fill
        out.append(Window(begin, min(length, begin + context), out[-1].end))
    return out


def score(
    model: Model,
    rows: Sequence[Sequence[int]],
    *,
    seed: int,
    batch_size: int,
    progress: Progress,
    keys: Sequence[int] | None = None,
) -> list[Tensor]:
    """-ln p of every token of every row, float32 [len(row)] each; see `Model.nats` for what that is.

    Args:
        keys: of the noise of a diffusion head, below 2^32; default 0, 1, ... Rows with one key share their noise.
    """
    keys = range(len(rows)) if keys is None else keys
    out = [torch.zeros(len(row)) for row in rows]
    work = [
        (i, j, window)
        for i, row in enumerate(rows)
        if len(row)
        for j, window in enumerate(windows(len(row), model.block_size, model.context))
    ]
    work.sort(key=lambda item: item[2].begin - item[2].end)  # rows of one length together: little padding
    for start in progress.over(range(0, len(work), batch_size), step=batch_size, total=len(work)):
        some = work[start : start + batch_size]
        pieces = [rows[i][window.begin : window.end] for i, _, window in some]
        nats = model.nats(pieces, [keys[i] + (j << 32) for i, j, _ in some], seed)
        for (i, _, window), values in zip(some, nats, strict=True):
            out[i][window.counted : window.end] = values[window.counted - window.begin :]
    return out


def encode_behind(model: Model, context: str, text: str) -> tuple[list[int], int]:
    """Ids of context and text as one, and how many of them are the text's.

    Tokenized together, because some tokenizers write a text's beginning in another way. The text's tokens are those
    from the first on that has a part of the text, found by what the tokens' text is: one that lies on the border counts
    whole, and if the context's end is tokenized in another way with the text behind it, no token of the context counts.
    (lm-evaluation-harness takes away as many tokens as the context has by itself, which is the same where those are how
    the whole begins, and moves the context's last spaces to the text, whose token counts here anyhow.)
    """
    ids = model.encode(context + text)
    if not context:
        return ids, len(ids)
    whole, alone = model.decode(ids), model.encode(context)
    end = common(model.decode(alone), whole)  # of the context in the decoded text, which may have been normalised

    def reach(count: int) -> int:
        """Characters of the whole text that the first tokens have, without one that is not complete."""
        return common(model.decode(ids[:count]), whole)

    border = min(len(alone), len(ids))  # a guess, and most often right
    while border > 0 and reach(border - 1) >= end:
        border -= 1
    while border < len(ids) and reach(border) < end:
        border += 1
    if reach(border) > end:  # the token before has the context's end and the text's beginning
        border -= 1
    return ids, max(1, len(ids) - border)
