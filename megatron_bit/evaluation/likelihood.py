"""Likelihood of the validation split, with a standard error that tells noise from text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_bit.evaluation.models import Model
from megatron_bit.evaluation.progress import Progress
from megatron_bit.evaluation.scoring import score
from megatron_bit.evaluation.validation import Validation
from megatron_bit.io.measured import exponential, quotient

SAMPLES, TOLERANCE, MAX_PASSES = 256, 0.01, 16  # where nothing is said; the tolerance in nats per token


@dataclass(frozen=True)
class Likelihood:
    """Of a diffusion head an upper bound of -ln p, of the others its value."""

    nats_per_token: float  # mean over samples
    standard_error: float  # of that mean: of text and noise together
    text_standard_error: float  # if the bound of each sample were known exactly: another text, another mean
    noise_standard_error: float  # of the estimate of the bound of these samples; 0 where there is no noise
    exact: bool
    passes: int  # estimates of every sample's bound, each with noise of its own
    noise_samples: int  # noise levels of a block in a pass; 0 where there is no noise
    samples: int
    tokens: int  # of all samples
    bytes: int | None  # of text: UTF-8 bytes of these samples
    bits_per_byte: float | None  # of text: all nats of these samples, those of ends of documents too, over their bytes
    perplexity: float | None  # of a token of text
    bits_per_record: float | None  # of raw records, which tokens are then


def measure(
    model: Model,
    validation: Validation,
    *,
    samples: int,
    tolerance: float,
    max_passes: int,
    seed: int,
    batch_size: int,
) -> Likelihood:
    """Mean nats per token of the first samples of the split, each of the model's context.

    The first pass has the noise of the trainer's validation if the model is a run of ours, and so its number. Then
    come passes with noise of their own until the standard error of the noise is at most the tolerance. Every pass is
    unbiased and all weigh the same. Samples share no noise, so the variance of a sample's values over the passes,
    averaged over the samples, gives the noise of their mean; what is left of the variance between samples is text.

    Args:
        samples: at most; the split may have fewer.
        tolerance: nats per token.
        max_passes: at least 2: noise that was drawn once has no known error.
    """
    rows = validation.samples(samples, model.context)
    values: list[list[float]] = []
    for own in _seeds(model, seed):
        progress = Progress("likelihood" if model.exact else f"likelihood, pass {len(values) + 1}")
        nats = score(model, rows, seed=own, batch_size=batch_size, progress=progress)
        values.append([row.double().mean().item() for row in nats])
        if model.exact:
            break
        if len(values) >= 2 and (len(values) >= max_passes or standard_errors(values)[2] <= tolerance):
            break
    mean, text = float(np.mean(values)), not model.record_bits
    tokens = len(rows) * model.context
    total, of_text, noise = standard_errors(values)
    return Likelihood(
        nats_per_token=mean,
        standard_error=total,
        text_standard_error=of_text,
        noise_standard_error=noise,
        exact=model.exact,
        passes=len(values),
        noise_samples=0 if model.exact else model.noise_samples,
        samples=len(rows),
        tokens=tokens,
        bytes=validation.bytes if text else None,
        bits_per_byte=quotient(mean * tokens / math.log(2), validation.bytes) if text else None,
        perplexity=exponential(mean) if text else None,
        bits_per_record=None if text else mean / math.log(2),
    )


def _seeds(model: Model, seed: int) -> Iterator[int]:
    """Of the passes, without end and without one twice: a run's own, and then from `seed` on."""
    own = None if model.training is None else model.training.train.seed
    if own is not None:
        yield own
    yield from (other for other in itertools.count(seed) if other != own)


def standard_errors(values: list[list[float]]) -> tuple[float, float, float]:
    """(of both, of text, of noise) of the mean of values [passes][samples]; one pass is taken to have no noise."""
    x = np.asarray(values)
    passes, samples = x.shape
    total = x.mean(0).var(ddof=1) / samples
    noise = x.var(0, ddof=1).mean() / (passes * samples) if passes > 1 else 0.0
    total = max(total, noise)  # where there is almost nothing but noise, the variance of few means may be below it
    return math.sqrt(total), math.sqrt(total - noise), math.sqrt(noise)
