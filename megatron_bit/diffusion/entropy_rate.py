"""Noise levels where the bits are decided: a density measured in training (MATH.md, "Entropy-rate schedule").

The rate dH / d ln sigma = E||x - x_hat||^2 / sigma^2 of a token is what the likelihood bound integrates. It is measured
in bins of ln sigma on the loss's own draws, and the density is constant in a bin, so that a level, its probability and
the importance weight of the bound always belong together, warm-up included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_bit.errors import UserError

BINS = 128
MEMORY = 0.99  # a step's weight in the running mean falls by this with each step
PRIOR = 1e-3  # weight of the rate of independent bits in a bin, against 1 for all draws of a step
FLOOR = 0.02  # of the draws are uniform over ln sigma: every bin stays measured, every importance weight bounded
CUTOFF = 0.1  # sigma on bits of {0, 1} below which levels are drawn less, by sigma^3


class EntropyRate:
    """The table of rates and the distribution made of it. The same on every rank and chunk.

    The tensors are no buffers of a module: DeepSpeed would cast them.
    """

    def __init__(
        self,
        sigma_min: float,
        sigma_max: float,
        bits: int,
        warmup_masses: Sequence[float],
        warmup: int,
        device: torch.device,
    ) -> None:
        """
        Args:
            bits: of a token.
            warmup_masses: probabilities of the BINS bins in the first `warmup` steps.
        """
        self.sigma_min, self.sigma_max, self._warmup = sigma_min, sigma_max, warmup
        self.low, self.width = math.log(sigma_min), math.log(sigma_max / sigma_min) / BINS
        center = self.low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * self.width
        self._prior = independent_rate(center, bits).to(device)
        cube = (center.exp() / 2) ** 3
        self._damping = (cube / (cube + CUTOFF**3)).to(device)
        self._begin = torch.tensor(warmup_masses, dtype=torch.float64, device=device)
        self.sums = torch.zeros(BINS, device=device)  # float32: rates of all draws, older ones counting less
        self.counts = torch.zeros(BINS, device=device)  # float32: draws, in shares of a step's
        self.steps = 0  # measured
        self._refresh()

    def histogram(self, log_sigma: Tensor, rate: Tensor) -> Tensor:
        """Sums of `rate` and counts by bin, of float32 tensors of one shape: float32 [2 * BINS], over the elements.

        By a product with indicators: adding into bins has no fixed order on a GPU.
        """
        index = self._bins(log_sigma.flatten())
        inside = (index[:, None] == torch.arange(BINS, device=index.device)).float()
        return torch.cat((rate.flatten() @ inside, inside.sum(0))) / log_sigma.numel()

    def update(self, histogram: Tensor) -> None:
        """Take in a step's histogram, summed over all ranks; one that is not finite leaves the table alone."""
        sums, counts = histogram.view(2, BINS)
        finite = histogram.isfinite().all()
        self.sums = torch.where(finite, MEMORY * self.sums + sums, self.sums)
        self.counts = torch.where(finite, MEMORY * self.counts + counts, self.counts)
        self.steps += 1
        self._refresh()

    @property
    def rate(self) -> Tensor:
        """float64 [BINS], nats per token and unit of ln sigma."""
        return (self.sums.double() + PRIOR * self._prior) / (self.counts.double() + PRIOR)

    @property
    def masses(self) -> Tensor:
        """float64 [BINS], probabilities of the bins."""
        return self._masses

    def log_sigma(self, u: Tensor) -> Tensor:
        """Inverse distribution function: u in (0, 1) to ln sigma, float32, same shape."""
        u = u.double()
        index = torch.searchsorted(self._cdf[1:-1], u, right=True)
        value = self.low + self.width * (index + (u - self._cdf[index]) / self._masses[index])
        return value.float().clamp(math.log(self.sigma_min), math.log(self.sigma_max))

    def density(self, log_sigma: Tensor) -> Tensor:
        """Density over ln sigma, float32, same shape."""
        return (self._masses[self._bins(log_sigma)] / self.width).float()

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps; waits for the device. A float32 comes back from JSON as it was."""
        return {
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "steps": self.steps,
            "sums": self.sums.tolist(),
            "counts": self.counts.tolist(),
        }

    def load(self, table: Mapping[str, Any]) -> None:
        """Go on from what `to_json` gave; UserError if its bins are others."""
        for key, mine in (("sigma_min", self.sigma_min), ("sigma_max", self.sigma_max)):
            if table[key] != mine:
                raise UserError(
                    f"diffusion.{key} is {mine}, and the checkpoint's table of noise levels was measured with "
                    f"{table[key]}; set diffusion.{key}={table[key]}, or another diffusion.noise"
                )
        self.sums = torch.tensor(table["sums"], dtype=torch.float32, device=self.sums.device)
        self.counts = torch.tensor(table["counts"], dtype=torch.float32, device=self.counts.device)
        self.steps = int(table["steps"])
        self._refresh()

    def _bins(self, log_sigma: Tensor) -> Tensor:
        return ((log_sigma.double() - self.low) / self.width).long().clamp(0, BINS - 1)

    def _refresh(self) -> None:
        blend = 1.0
        if self.steps < 2 * self._warmup:
            blend = max(0, self.steps - self._warmup) / self._warmup
        wanted = self._damping * self.rate.sqrt()
        wanted = (1.0 - FLOOR) * wanted / wanted.sum() + FLOOR / BINS
        masses = (1.0 - blend) * self._begin + blend * wanted
        self._masses = masses / masses.sum()
        self._cdf = torch.nn.functional.pad(self._masses.cumsum(0), (1, 0))


def independent_rate(log_sigma: Tensor, bits: int) -> Tensor:
    """B mmse(sigma) / sigma^2 of independent uniform bits, whose posterior mean is tanh(z / sigma^2); float64."""
    normal = torch.linspace(-8.0, 8.0, 801, dtype=torch.float64)
    weight = torch.exp(-0.5 * normal * normal)
    sigma = log_sigma.double().exp()[..., None]
    wrong = 2.0 * torch.sigmoid(-2.0 * (1.0 + sigma * normal) / sigma**2)  # 1 - tanh, without cancellation
    return bits * (wrong.square() * weight / weight.sum()).sum(-1) / sigma.squeeze(-1) ** 2
