"""How tokens enter: embeddings of their groups' values, products over pairs of them, and hashed n-grams."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bits_bitlm import table_rows
from .configuration_bitlm import BitLMConfig

_GOLDEN, _MIX = 0x9E3779B97F4A7C15 - (1 << 64), (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_GROUP, _TOKEN, _SALT, _BEGUN = 0, 1, 2, 63  # what has factors of its own; what comes behind the tokens of an n-gram


def look_up(table: Tensor, values: Tensor) -> Tensor:
    """Values int64 [..., G] to embeddings [..., G, width]."""
    groups = values.shape[-1]
    return F.embedding(values + torch.arange(groups, device=values.device) * (len(table) // groups), table)


def mean_of(table: Tensor, probability: Tensor) -> Tensor:
    """Probabilities of values [..., G, U] to the means of their embeddings [..., G, width]."""
    return torch.einsum("...gu,guw->...gw", probability, table.unflatten(0, (probability.shape[-2], -1)))


class Pairs(nn.Module):
    """Products over all pairs of groups of a second set of embeddings, through a linear map."""

    def __init__(self, config: BitLMConfig, size: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.zeros(table_rows(config), 2 * size))
        self.mix = nn.Linear(2 * size, size, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        """Values of the groups int64 [..., G] to [..., width]."""
        return self._mixed(look_up(self.factors, values))

    def expected(self, probability: Tensor) -> Tensor:
        """Probabilities of values [..., G, U] to [..., width], as of independent groups."""
        return self._mixed(mean_of(self.factors, probability))

    def _mixed(self, x: Tensor) -> Tensor:
        count = x.shape[-2]
        return self.mix((x * earlier(x)).sum(-2) * math.sqrt(2.0 / (count * (count - 1))))


def earlier(x: Tensor) -> Tensor:
    """[..., G, width] to the sum over the groups before each, of the same shape."""
    return x.cumsum(-2) - x


def make_pairs(config: BitLMConfig, size: int) -> Pairs | None:
    return Pairs(config, size) if config.names == "pairs" else None


def name_of(table: Tensor, pairs: Pairs | None, values: Tensor) -> Tensor:
    """What tokens are called where they enter: values int64 [..., G] to [..., width]."""
    x = look_up(table, values).sum(-2)
    return x if pairs is None else x + pairs(values)


def _mixed(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), int64."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX[0]
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX[1]
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _factors(kind: int, count: int, device: torch.device) -> Tensor:
    return _mixed((torch.arange(1, count + 1, device=device) + (kind << 32)) * _GOLDEN) | 1


def begun_keys(values: Tensor) -> Tensor:
    """Values of groups int64 [..., G] to keys of the first group, the first two, and so on up to all, [..., G]."""
    return _mixed(((values + 1) * _factors(_GROUP, values.shape[-1], values.device)).cumsum(-1))


class Memory(nn.Module):
    """Embeddings of hashed n-grams of tokens, a table for each order and hash, one under the other."""

    def __init__(self, config: BitLMConfig, size: int) -> None:
        super().__init__()
        self.rows, self.orders, self.hashes = config.memory_rows, config.memory_orders, config.memory_hashes
        self.table = nn.Parameter(torch.zeros(self.rows * len(self.orders) * self.hashes, size))

    def forward(self, keys: Tensor, known: Tensor, begun: Tensor | None = None) -> Tensor:
        """
        Args:
            keys: int64 [b, R + s], of the s tokens with which n-grams end, and of R more before them.
            known: int64 [b, s], how many tokens of the text there are up to each.
            begun: int64 [b, s, N], keys of what comes behind each and is its n-grams' last part.

        Returns:
            [b, s, W], or [b, s, N, W]; of n-grams for which the text is too short yet nothing.
        """
        size, out = known.shape[1], torch.zeros((), device=keys.device, dtype=self.table.dtype)
        token, salt = (_factors(kind, 64, keys.device) for kind in (_TOKEN, _SALT))
        for i, order in enumerate(self.orders):
            count = order if begun is None else order - 1
            key = torch.zeros_like(known)
            for j in range(count):
                key = key + keys[:, keys.shape[1] - size - j : keys.shape[1] - j] * token[j]
            enough = (known >= count)[..., None]
            if begun is not None:
                key, enough = key[..., None] + begun * token[_BEGUN], enough[..., None]
            for k in range(self.hashes):
                number = i * self.hashes + k
                row = (_mixed(key + salt[number]) & (2**63 - 1)) % self.rows + number * self.rows
                out = out + F.embedding(row, self.table) * enough
        return out


def make_memory(config: BitLMConfig, size: int) -> Memory | None:
    return Memory(config, size) if config.memory_rows else None


def reach_of(config: BitLMConfig) -> int:
    """Tokens before a token that the head has to know: the one before, and those of its n-grams."""
    return max([1, *config.memory_orders]) if config.memory_rows else 1
