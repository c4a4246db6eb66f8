"""Quality of generated text: generative perplexity and diversity, beside real text of the same lengths."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bit.errors import UserError
from megatron_bit.evaluation import mauve_score
from megatron_bit.evaluation.models import Model
from megatron_bit.evaluation.progress import Progress
from megatron_bit.evaluation.scoring import encode_behind, score
from megatron_bit.evaluation.validation import Validation
from megatron_bit.io.measured import exponential, quotient


@dataclass(frozen=True)
class Statistics:
    """Of a set of texts, in the tokens of the model that scores them.

    Perplexity says little without the entropy beside it: text that repeats itself has a low one.
    """

    nats_per_token: float  # all nats over all tokens
    standard_error: float  # of that ratio, over texts
    perplexity: float
    nats_per_byte: float  # the nats of those tokens over the bytes of these texts, without their contexts
    unigram_entropy: float  # nats: of the frequencies of the tokens in one text, averaged over texts
    distinct: tuple[float, float, float]  # different n-grams over all n-grams, of all texts together; n = 1, 2, 3
    tokens: int
    bytes: int  # UTF-8


@dataclass(frozen=True)
class Samples:
    """Generated text and real text that has as many of the generating model's tokens behind the same prefixes."""

    texts: int
    tokens: int  # of each, of the generating model
    prefix: int
    how: dict[str, Any]  # steps, sampler, temperature, guidance, where they were given
    scorer: str
    scorer_head: str
    generated: Statistics
    real: Statistics
    mauve: float | None
    mauve_not_computed: str | None  # why
    first: str  # beginning of the first generated text


def measure(
    model: Model,
    scorer: Model,
    validation: Validation,
    *,
    texts: int,
    tokens: int,
    prefix: int,
    how: Mapping[str, Any],
    featurizer: Path | None,
    seed: int,
    batch_size: int,
) -> Samples:
    """Generate texts and score them; text number i is that of (seed, i), whatever the batch.

    Without a prefix the model begins as at the beginning of a training sample, which lies anywhere in the stream of
    documents: real text is pieces of that stream. With a prefix both continue the same pieces of documents.
    An end of a document does not end a text.
    """
    model.check(how)
    reason = mauve_score.why_not(featurizer)
    pieces = (validation.spread_in_documents if prefix else validation.spread)(texts, prefix + tokens)
    prompts = [piece[:prefix] for piece in pieces]
    made: list[list[int]] = []
    for start in Progress("generating").over(range(0, texts, batch_size), step=batch_size, total=texts):
        some = prompts[start : start + batch_size]
        made += model.generate(some, tokens, range(start, start + len(some)), seed, how)
    generated = [_behind(model, prompt, ids) for prompt, ids in zip(prompts, made, strict=True)]
    real = [_behind(model, piece[:prefix], piece[prefix:]) for piece in pieces]
    some = {"seed": seed, "batch_size": batch_size}
    return Samples(
        texts=texts,
        tokens=tokens,
        prefix=prefix,
        how=dict(how),
        scorer=str(scorer.path),
        scorer_head=scorer.head,
        generated=statistics("scoring the generated", scorer, *zip(*generated, strict=True), **some),
        real=statistics("scoring the real", scorer, *zip(*real, strict=True), **some),
        mauve=_mauve(generated, real, featurizer, seed) if featurizer and reason is None else None,
        mauve_not_computed=reason,
        first="".join(generated[0])[:400],
    )


def _behind(model: Model, prompt: Sequence[int], new: Sequence[int]) -> tuple[str, str]:
    """The text of prompt and new tokens in two: where that of the new ones begins, see `Decoder.behind`."""
    whole, text = model.decode([*prompt, *new]), model.decoder.behind(prompt, new)
    return whole[: len(whole) - len(text)], text


def _mauve(generated: Sequence[tuple[str, str]], real: Sequence[tuple[str, str]], featurizer: Path, seed: int) -> float:
    return mauve_score.compute([text for _, text in generated], [text for _, text in real], featurizer, seed=seed)


def statistics(
    name: str, scorer: Model, contexts: Sequence[str], texts: Sequence[str], *, seed: int, batch_size: int
) -> Statistics:
    """Score texts, each behind its context (which may be empty and is not scored itself).

    Raises:
        UserError: there is nothing to score.
    """
    rows, behind = [], []
    for context, text in zip(contexts, texts, strict=True):
        ids, count = encode_behind(scorer, context, text) if text else ([], 0)
        rows.append(ids)
        behind.append(ids[len(ids) - count :])
    if not any(behind):
        raise UserError(f"{name} texts: all {len(texts)} are empty")
    nats = score(scorer, rows, seed=seed, batch_size=batch_size, progress=Progress(name))
    sums = [row[len(row) - len(ids) :].double().sum().item() for row, ids in zip(nats, behind, strict=True)]
    mean, error = ratio(sums, [len(ids) for ids in behind])
    size = sum(len(text.encode()) for text in texts)
    return Statistics(
        nats_per_token=mean,
        standard_error=error,
        perplexity=exponential(mean),
        nats_per_byte=quotient(sum(sums), size),
        unigram_entropy=float(np.mean([entropy(ids) for ids in behind if ids])),
        distinct=(distinct(behind, 1), distinct(behind, 2), distinct(behind, 3)),
        tokens=sum(map(len, behind)),
        bytes=size,
    )


def ratio(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Sum over sum, and its standard error over the pairs (the linearised one of a ratio of means)."""
    x, n = np.asarray(sums), np.asarray(counts)
    mean = x.sum() / n.sum()
    spread = (x - mean * n).var(ddof=1) if len(x) > 1 else 0.0
    return float(mean), float(math.sqrt(spread * len(x)) / n.sum())


def entropy(ids: Sequence[int]) -> float:
    """Of the frequencies of the tokens of one text, in nats."""
    p = np.array(list(Counter(ids).values())) / len(ids)
    return float(-(p * np.log(p)).sum())


def distinct(rows: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of all rows together (Li et al., arXiv 1510.03055); 0 if there is none.

    It falls with the amount of text, so only sets of as many texts of one length can be compared.
    """
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
