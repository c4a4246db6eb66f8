"""What the head's outputs say of the bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .bits_bitlm import bits_of, codes_of, group_slices, group_values
from .configuration_bitlm import BitLMConfig

CLIP = 30.0  # of the matched filter's log-odds


class Posterior:
    """What the head's outputs say of the bits: logits are log-odds [..., B] of single bits, or with groups
    log-probabilities of their values, [..., G, U] (minus infinity for those a smaller group lacks)."""

    def __init__(self, config: BitLMConfig) -> None:
        self.config, self.groups = config, config.head_kind == "chain" or max(config.group_sizes) > 1

    def logits(self, outputs: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
        """outputs of the head [..., outputs], z = x + sigma eps float32 [..., B]."""
        odds = (2.0 * z / (sigma * sigma)).clamp(-CLIP, CLIP)  # exact for a bit that has nothing to do with the others
        if not self.groups:
            return outputs.float() + odds if self.config.matched_filter else outputs.float()
        outputs = outputs.float().unflatten(-1, (len(self.config.group_sizes), -1))
        if self.config.matched_filter:
            outputs = outputs + self.evidence(odds)
        return self.log_softmax(outputs)

    def likely(self, z: Tensor, sigma: Tensor, prior: Tensor | None = None) -> Tensor:
        """Probabilities of values given their own noisy bits and the prior's logits [..., outputs], [..., G, U]."""
        return self.log_likely(z, sigma, prior).exp()

    def log_likely(self, z: Tensor, sigma: Tensor, prior: Tensor | None = None) -> Tensor:
        """Their logarithms."""
        evidence = self.evidence((2.0 * z / (sigma * sigma)).clamp(-CLIP, CLIP))
        if prior is not None:
            evidence = evidence + prior.float().unflatten(-1, evidence.shape[-2:])
        return self.log_softmax(evidence)

    def evidence(self, odds: Tensor) -> Tensor:
        """Log-odds of bits [..., B] to unnormalised log-probabilities of values [..., G, U]."""
        parts = []
        for part, size in zip(group_slices(self.config), self.config.group_sizes, strict=True):
            value = 0.5 * odds[..., part] @ codes_of(size, odds).t()
            parts.append(F.pad(value, (0, 2 ** max(self.config.group_sizes) - 2**size)))
        return torch.stack(parts, dim=-2)

    def log_softmax(self, logits: Tensor, groups: slice = slice(None)) -> Tensor:
        """Over the values [..., g, U] of these groups, of which a smaller one lacks some."""
        if min(self.config.group_sizes) == max(self.config.group_sizes):
            return logits.log_softmax(-1)
        sizes = torch.tensor(self.config.group_sizes[groups], device=logits.device)[:, None]
        missing = torch.arange(logits.shape[-1], device=logits.device) >= 2**sizes
        return logits.masked_fill(missing, float("-inf")).log_softmax(-1)

    def _probability(self, logits: Tensor, bit: int) -> Tensor:
        parts = []
        for i, size in enumerate(self.config.group_sizes):
            parts.append(logits[..., i, : 2**size].exp() @ (codes_of(size, logits) == bit).to(logits.dtype))
        return torch.cat(parts, dim=-1)

    def mean(self, logits: Tensor) -> Tensor:
        """E[x | z], [..., B]."""
        if not self.groups:
            return torch.tanh(0.5 * logits)
        return self._probability(logits, 1) - self._probability(logits, -1)

    def squared_error(self, logits: Tensor, x: Tensor) -> Tensor:
        """(x - E[x | z])^2 of every bit, [..., B]."""
        if not self.groups:
            return 4.0 * torch.sigmoid(-x * logits).square()
        return 4.0 * torch.where(x > 0, self._probability(logits, -1), self._probability(logits, 1)).square()

    def cross_entropy(self, logits: Tensor, x: Tensor) -> Tensor:
        """-ln p of the bits [..., B], or of the groups [..., G]."""
        if not self.groups:
            return F.softplus(-x * logits)
        values = group_values(self.config, x)[..., None]
        return -logits.gather(-1, values.expand(*logits.shape[:-1], 1)).squeeze(-1)

    def likeliest(self, logits: Tensor) -> Tensor:
        """The likeliest value of every group, or bit, as bits [..., B]."""
        return bits_of(self.config, logits.argmax(-1)) if self.groups else logits.sign()

    def nearest_token(self, logits: Tensor, table: Tensor) -> Tensor:
        """The likeliest tokens, int64 [...]; of single bits megatron-bit may put a faster form here."""
        return self.token_scores(logits, table).argmax(-1)

    def token_scores(self, logits: Tensor, table: Tensor) -> Tensor:
        """Log-probability of every token but for a constant, [..., V], from the code table [V, B]."""
        if not self.groups:
            return logits @ table.t().float()
        values = group_values(self.config, table)
        return torch.stack([logits[..., i, v] for i, v in enumerate(values.t())]).sum(0)
