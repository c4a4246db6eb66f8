"""Learning-rate schedules: pure functions of the step. Imports no torch."""

from __future__ import annotations

import math

from megatron_bit.config import Config


def decay_begin(steps: int, fraction: float) -> int:
    """The step at which the decay of `wsd` begins, of a run of so many steps whose warm-up is over by then."""
    return steps - max(1, round(steps * fraction))


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of update number `step` (0-based).

    Warm-up is linear. `cosine` falls to lr * min_lr_ratio at `train.steps`; `wsd` stays at lr and falls linearly
    over the last `decay_fraction` of the run.
    """
    o, total = config.optim, config.train.steps
    warmup = min(o.warmup_steps, total)
    if step < warmup:
        return o.lr * (step + 1) / warmup
    floor = o.lr * o.min_lr_ratio
    if o.schedule == "cosine":
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return floor + (o.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    start = max(warmup, decay_begin(total, o.decay_fraction))
    if step < start:
        return o.lr
    return o.lr + (floor - o.lr) * min(1.0, (step - start) / max(1, total - start))
