"""`diffusion`: noise, and what is asked of the head."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from megatron_bit.config.section import Section


class DiffusionConfig(Section):
    loss: Literal["auto", "mse", "bce"] = "auto"
    """Squared error of the posterior mean with the EDM weight, or cross-entropy of the bits (with `model.group_bits`
    above 1: of the groups' values). `auto`: mse with group_bits=1, else bce."""
    parameterization: Literal["matched_filter", "direct"] = "matched_filter"
    """`matched_filter` adds to the head's logits what the noisy bits tell by themselves, which is known exactly;
    `direct` leaves it to the head."""
    noise_samples: int = Field(default=4, ge=1, le=4096)
    """Independent noise levels that share one backbone state (stratified)."""
    levels_apart: int = Field(default=0, ge=0, le=4095)
    """So many of the noise samples give every group of bits of the block (`model.group_bits` above 1) a level of its
    own: a neighbour that is clean enough to tell something is learned from while the group itself is not decided yet.
    The others have one level for the block, as validation and generation have; from them alone the log's bound is."""
    noisy_every: int | None = Field(default=0, ge=0, le=2**20)
    """Of a `chain`: one of every so many blocks is evaluated once more in training, with noise on what its groups of
    bits see of those before them in the block, at levels of their own. Such a head also draws and scores along a front
    of noise over several groups, up to all of a block together (`overlap`). 0: none, the chain alone; 1: all blocks;
    null: 8 where it can be, which costs a chain nothing that was measured (docs/quality.md)."""
    sigma_min: float = Field(default=0.1, gt=0)
    """Smallest noise level (on bits of -1, +1)."""
    sigma_max: float = Field(default=160.0, gt=0)
    """Largest noise level."""
    noise: Literal["lognormal", "logistic", "entropy_rate"] = "lognormal"
    """Which noise levels are trained at: ln(sigma / 2) normal or logistic, truncated to the range above, or as many as
    the bits that are decided there: the measured error / sigma^2 in 128 bins of ln sigma makes the density, which is
    also the sampler's grid. The table of it is part of a checkpoint."""
    noise_warmup: int = Field(default=200, ge=0)
    """`entropy_rate`: steps of log-normal levels before the measured density is blended in, over as many again."""
    log_mean: float = -1.2
    """Mean of ln(sigma / 2) in training."""
    log_std: float = Field(default=1.2, gt=0)
    """Standard deviation of ln(sigma / 2) in training; of `logistic`, the scale."""

    context_noise: float = Field(default=0.0, ge=0, le=1)
    """In training each bit that enters the backbone is flipped with this probability times a number of its sample's,
    uniform in (0, 1); what is predicted stays clean. Of chain heads too."""
    condition_drop: float = Field(default=0.0, ge=0, lt=1)
    """In training the head does without the backbone with this probability, each block of a sample by itself, and so
    learns the unconditional answer that `generate --guidance` steers away from. The training loss counts such blocks,
    validation has none. Of chain heads too; their view of the newest tokens stays."""
    self_condition: float = Field(default=0.0, ge=0, le=1)
    """Above 0, a `diffusion` head has one more input: its own estimate of the clean bits (Analog Bits, 2208.04202). In
    training a first evaluation without gradients makes it, and it is shown to this share of the evaluations that
    learn, each noise level of a block by itself (0.5 is usual). Validation always shows it; in generation it is the
    estimate of the step before. Training pays a forward pass of the head more, validation an evaluation."""

    @model_validator(mode="after")
    def _check(self) -> DiffusionConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} has to be smaller than sigma_max {self.sigma_max}")
        if self.levels_apart >= self.noise_samples:
            raise ValueError(
                f"levels_apart {self.levels_apart} has to be smaller than noise_samples {self.noise_samples}: one "
                f"evaluation of a block at least has one level for all"
            )
        low, high = ((math.log(s / 2) - self.log_mean) / self.log_std for s in (self.sigma_min, self.sigma_max))
        if self.noise == "logistic":
            mass = 0.5 * (math.tanh(0.5 * high) - math.tanh(0.5 * low))
        else:
            mass = 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
        if mass < 0.05:
            raise ValueError(
                f"log_mean {self.log_mean} and log_std {self.log_std} put {100 * mass:.2g} % of the noise between "
                f"sigma_min {self.sigma_min} and sigma_max {self.sigma_max}; bring log_mean closer to "
                f"{math.log(math.sqrt(self.sigma_min * self.sigma_max) / 2):.2f}"
            )
        return self
