"""Groups of bits decided together: the dial between independent bits (g = 1) and a softmax (MATH.md, "The dial").

A group of n bits has 2^n values; all groups have room for U values, and those that a smaller group lacks are invalid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BitGroups(nn.Module):
    """Bits to values of groups and back. G groups, U values, P bits of the largest group; U = 2^P."""

    columns: Tensor  # int64 [G, P]: which bit stands where; B where there is none
    weights: Tensor  # int64 [G, P]: what a bit counts in its group's value; 0 where there is none
    codes: Tensor  # float32 [G, U, P]: the bits (-1, +1) of a value; 0 where there is none
    invalid: Tensor  # bool [G, U]
    places: Tensor  # int64 [B]: where bit j stands in the flattened [G, P]

    def __init__(self, sizes: Sequence[int]) -> None:
        """sizes: bits of each group (`ModelConfig.group_sizes`)."""
        super().__init__()
        bits, widest = sum(sizes), max(sizes)
        self.count = len(sizes)
        self.values = 2**widest
        self.uneven = len(set(sizes)) > 1  # else no value is invalid
        columns = torch.full((self.count, widest), bits)
        weights = torch.zeros(self.count, widest, dtype=torch.int64)
        first = 0
        for i, size in enumerate(sizes):
            columns[i, :size] = torch.arange(first, first + size)
            weights[i, :size] = 2 ** torch.arange(size - 1, -1, -1)
            first += size
        value = torch.arange(self.values)[:, None]
        digits = ((value & weights[:, None, :]) > 0).float() * 2 - 1
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("codes", digits * (weights[:, None, :] > 0), persistent=False)
        self.register_buffer("places", (weights > 0).flatten().nonzero().squeeze(-1), persistent=False)
        self.register_buffer("invalid", value.t() >= 2 ** torch.tensor(sizes)[:, None], persistent=False)

    def spread(self, x: Tensor) -> Tensor:
        """What groups have, [..., G], to each of their bits, [..., B]."""
        return x[..., self.places // self.columns.shape[1]]

    def sums(self, x: Tensor) -> Tensor:
        """What bits have, [..., B], summed over each group, [..., G]."""
        return self._split(x).sum(-1)

    def index(self, x: Tensor) -> Tensor:
        """Bits [..., B] to the values of their groups, int64 [..., G]."""
        return ((self._split(x) > 0) * self.weights).sum(-1)

    def evidence(self, odds: Tensor) -> Tensor:
        """Log-odds of single bits, float32 [..., B], to unnormalised log-probabilities of values [..., G, U].

        For odds 2 z / sigma^2 this is z_group . c_u / sigma^2: the matched filter of a group.
        """
        return torch.einsum("...gp,gup->...gu", self._split(odds) * 0.5, self.codes.float())

    def mean(self, table: Tensor, probability: Tensor) -> Tensor:
        """Of embeddings [G * U, width] the means over the values, [..., G, width]; probability [..., G, U]."""
        return torch.einsum("...gu,guw->...gw", probability, table.unflatten(0, (self.count, self.values)))

    def log_softmax(self, logits: Tensor) -> Tensor:
        """[..., G, U] to float32 log-probabilities over each group's valid values."""
        return logits.float().masked_fill(self.invalid, float("-inf")).log_softmax(-1)

    def probability_of(self, log_p: Tensor, bit: int) -> Tensor:
        """P(bit j is `bit`), `bit` -1 or +1: [..., G, U] to [..., B], a sum of positive terms."""
        p = torch.einsum("...gu,gup->...gp", log_p.exp(), (self.codes * bit > 0).to(log_p.dtype))
        return self._join(p)

    def _split(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, 1))[..., self.columns]

    def _join(self, x: Tensor) -> Tensor:
        return x.flatten(-2)[..., self.places]
