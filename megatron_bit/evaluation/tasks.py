"""Zero-shot tasks: rank a context's continuations by their likelihood, or tell the last word of a passage.

What a choice costs. Context and choice are scored as one text, and the nats of the choice's tokens are added up: all
nats less those of the context, in the same pass and so under the same alignment to blocks. The likelihood of softmax
and chain heads is a product over tokens, and this is exactly -ln p(choice | context). A diffusion head gives bounds of
whole blocks only. Its texts are filled up in front to whole blocks, so that a choice ends with a block, but it begins
inside one if its length is no multiple of K. There the tokens' shares are counted: what that block tells about the end
of the context and the beginning of the choice together is divided between them, equally for every choice. Counting
whole blocks instead would charge some choices for more tokens of the context than others.

The choices of an item share their noise, which makes their differences less noisy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_bit.evaluation.models import Model
from megatron_bit.evaluation.progress import Progress
from megatron_bit.evaluation.scoring import encode_behind, score
from megatron_bit.evaluation.task_files import Item
from megatron_bit.io.measured import exponential


@dataclass(frozen=True)
class Ranking:
    """Share of items whose right choice is the likeliest, by its nats and by its nats per UTF-8 byte of the choice.

    The bytes are those of the choice's text, with the space in front of it, and not those of the context; the nats are
    those of its tokens (`scoring.encode_behind`).
    """

    task: str
    items: int
    accuracy: float
    standard_error: float
    accuracy_per_byte: float
    standard_error_per_byte: float
    chance: float


@dataclass(frozen=True)
class LastWord:
    """Nats of the last word of a passage; one word may be several tokens."""

    task: str
    items: int
    nats_per_word: float
    standard_error: float
    perplexity: float  # of the word
    accuracy: float | None  # greedy generation writes the word; None where it is not defined
    accuracy_standard_error: float | None
    accuracy_not_computed: str | None  # why


def rank(task: str, model: Model, items: Sequence[Item], *, seed: int, batch_size: int) -> Ranking:
    """Score every choice of every item. A text longer than the context is scored in windows (`scoring.windows`)."""
    raw, normed = [], []
    for item, each in zip(items, costs(task, model, items, seed=seed, batch_size=batch_size), strict=True):
        sizes = [len(choice.encode()) for choice in item.choices]
        raw.append(int(np.argmin(each)) == item.label)
        normed.append(int(np.argmin(np.divide(each, sizes))) == item.label)
    return Ranking(
        task=task,
        items=len(items),
        accuracy=float(np.mean(raw)),
        standard_error=_error(raw),
        accuracy_per_byte=float(np.mean(normed)),
        standard_error_per_byte=_error(normed),
        chance=float(np.mean([1 / len(item.choices) for item in items])),
    )


def last_word(task: str, model: Model, items: Sequence[Item], *, seed: int, batch_size: int) -> LastWord:
    """Nats of the one choice of every item, and whether greedy generation would write its tokens.

    Greedy is the likeliest token after another: of a softmax that of its logits, of a chain the likeliest value of one
    group of bits after another, generated behind the context (`generate` with temperature 0). Denoising a block has
    nothing of the kind: its tokens come together, from noise.
    """
    nats = [each[0] for each in costs(task, model, items, seed=seed, batch_size=batch_size)]
    hits = written(task, model, items, batch_size=batch_size)
    mean = float(np.mean(nats))
    return LastWord(
        task=task,
        items=len(items),
        nats_per_word=mean,
        standard_error=float(np.std(nats, ddof=1) / math.sqrt(len(nats))) if len(nats) > 1 else 0.0,
        perplexity=exponential(mean),
        accuracy=None if hits is None else float(np.mean(hits)),
        accuracy_standard_error=None if hits is None else _error(hits),
        accuracy_not_computed="greedy generation is not defined for a diffusion head" if hits is None else None,
    )


def written(task: str, model: Model, items: Sequence[Item], *, batch_size: int) -> list[bool] | None:
    """Whether greedy generation writes the first choice of every item; None where it is not defined."""
    hits: list[bool] = []
    for start in Progress(f"{task}, greedy").over(range(0, len(items), batch_size), step=batch_size, total=len(items)):
        pairs = [_pair(model, item.context, item.choices[0]) for item in items[start : start + batch_size]]
        found = model.greedy([context for context, _ in pairs], [target for _, target in pairs])
        if found is None:
            return None
        hits += found
    return hits


def _pair(model: Model, context: str, choice: str) -> tuple[list[int], list[int]]:
    ids, count = encode_behind(model, context, choice)
    return ids[: len(ids) - count], ids[len(ids) - count :]


def costs(task: str, model: Model, items: Sequence[Item], *, seed: int, batch_size: int) -> list[list[float]]:
    """Nats of every choice of every item."""
    rows, counts, keys = [], [], []
    for i, item in enumerate(items):
        for choice in item.choices:
            ids, count = encode_behind(model, item.context, choice)
            rows.append(ids)
            counts.append(count)
            keys.append(i)
    nats = score(model, rows, seed=seed, batch_size=batch_size, progress=Progress(task), keys=keys)
    flat = iter([row[len(row) - n :].double().sum().item() for row, n in zip(nats, counts, strict=True)])
    return [[next(flat) for _ in item.choices] for item in items]


def _error(hits: Sequence[bool]) -> float:
    """Of the mean of `hits`."""
    p, n = float(np.mean(hits)), len(hits)
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else 0.0
