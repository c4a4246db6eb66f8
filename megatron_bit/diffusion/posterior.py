"""What the head's outputs mean: the posterior of a token's bits, bit by bit or group by group.

Two classes with the same methods. With g = 1 both are the same function (a test holds them together); `BitPosterior`
writes it without the values' dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from mbit_kernels import matched_filter
from torch import Tensor, nn

from megatron_bit.config import Config
from megatron_bit.diffusion.bit_groups import BitGroups


class BitPosterior(nn.Module):
    """Every bit by itself: logits are log-odds, [..., B]."""

    def __init__(
        self, bits: int, matched: bool, loss: Callable[..., tuple[Tensor, Tensor]] = matched_filter.bit_loss
    ) -> None:
        """loss: the form of `matched_filter.bit_loss` to use."""
        super().__init__()
        self.outputs, self.matched, self._loss = bits, matched, loss

    def token_loss(
        self, residual: Tensor, z: Tensor, x: Tensor, log_sigma: Tensor, kind: Literal["mse", "bce"]
    ) -> tuple[Tensor, Tensor]:
        """What training minimises, and the squared error summed over bits, detached: float32 [s, b, M] each.

        Arguments as of `denoising_loss`.
        """
        return self._loss(residual, z, x, log_sigma, kind, self.matched)

    def logits(self, residual: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
        """Head outputs [..., outputs] and noisy bits z float32 [..., B] to float32 logits; sigma broadcasts to z."""
        return (
            matched_filter.posterior_logits(residual, z, sigma)
            if self.matched
            else matched_filter.at_least_float32(residual)
        )

    def mean(self, logits: Tensor) -> Tensor:
        """E[x | z], float32 [..., B]."""
        return torch.tanh(0.5 * logits)

    def squared_error(self, logits: Tensor, x: Tensor) -> Tensor:
        """(x - E[x | z])^2 of every bit, float32 [..., B]; x of -1 and +1 broadcasts."""
        return matched_filter.squared_error(logits, x)

    def cross_entropy(self, logits: Tensor, x: Tensor) -> Tensor:
        """-ln p of what is decided together: of every bit, [..., B]; of every group, [..., G]."""
        return matched_filter.cross_entropy(logits, x)


class GroupPosterior(nn.Module):
    """Groups of bits: logits are log-probabilities of a group's values, [..., G, U]."""

    groups: BitGroups

    def __init__(self, groups: BitGroups, matched: bool) -> None:
        super().__init__()
        self.groups, self.matched = groups, matched
        self.outputs = groups.count * groups.values

    def token_loss(
        self, residual: Tensor, z: Tensor, x: Tensor, log_sigma: Tensor, kind: Literal["mse", "bce"]
    ) -> tuple[Tensor, Tensor]:
        sigma = log_sigma.exp()
        sigma = sigma[..., None] if sigma.dim() < z.dim() else sigma  # of a token, or of each of its bits
        logits = self.logits(residual, z, sigma)
        error = self.squared_error(logits, x)
        loss = matched_filter.edm_weight(sigma) * error if kind == "mse" else self.cross_entropy(logits, x)
        return loss.mean(-1), error.detach().sum(-1)

    def logits(self, residual: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
        g = self.groups
        logits = residual.float().unflatten(-1, (g.count, g.values))
        return g.log_softmax(logits + self.evidence(z, sigma) if self.matched else logits)

    def evidence(self, z: Tensor, sigma: Tensor) -> Tensor:
        """What the noisy bits alone say of each value: float32 [..., G, U], unnormalised log-probabilities."""
        return self.groups.evidence((2.0 * z / (sigma * sigma)).clamp(-matched_filter.CLIP, matched_filter.CLIP))

    def likely(self, z: Tensor, sigma: Tensor, prior: Tensor | None = None) -> Tensor:
        """Probabilities of each value given its own noisy bits, float32 [..., G, U]; prior: logits that broadcast to
        [..., outputs], of what is known of it besides."""
        evidence = self.evidence(z, sigma)
        if prior is not None:
            evidence = evidence + prior.float().unflatten(-1, (self.groups.count, self.groups.values))
        return self.groups.log_softmax(evidence).exp()

    def mean(self, logits: Tensor) -> Tensor:
        return self.groups.probability_of(logits, 1) - self.groups.probability_of(logits, -1)

    def squared_error(self, logits: Tensor, x: Tensor) -> Tensor:
        wrong = torch.where(x > 0, self.groups.probability_of(logits, -1), self.groups.probability_of(logits, 1))
        return 4.0 * wrong.square()  # x - mean is 2 P(wrong): no cancellation where it is tiny

    def cross_entropy(self, logits: Tensor, x: Tensor) -> Tensor:
        index = self.groups.index(x)[..., None]
        return -logits.gather(-1, index.expand(*logits.shape[:-1], 1)).squeeze(-1)


Posterior = BitPosterior | GroupPosterior


def build_posterior(config: Config, bit_loss: Callable[..., tuple[Tensor, Tensor]]) -> Posterior:
    """The posterior that a configuration asks for; bit_loss as of `BitPosterior`, and groups have a plain one."""
    m, matched = config.model, config.diffusion.parameterization == "matched_filter"
    if m.group_bits == 1:
        return BitPosterior(m.bits, matched, bit_loss)
    return GroupPosterior(BitGroups(m.group_sizes), matched)
