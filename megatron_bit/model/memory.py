"""Memory: embeddings of the newest tokens taken together, looked up in hashed tables of fixed size.

A token's key is a multilinear hash of its groups' values (Carter and Wegman, JCSS 1979), an n-gram's of its tokens'
keys, both modulo 2^64; splitmix64's finalizer (Steele, Lea and Flood, OOPSLA 2014) turns a key into a row. Nothing here
has the size of the vocabulary, and a row costs a lookup, however many there are (Tito Svenstrup et al., NeurIPS 2017;
arXiv 2501.16975, 2601.07372). The rows are split over TP: each rank looks up its own, of the whole sequence, and the
sum over TP has all of them, so a table's gradient needs no sum over TP, and its size no communication.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bit.config import Config, MemoryConfig
from megatron_bit.model.layers import init_device

NOTHING = -1  # the row of an n-gram that is not known
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's increment, and the two factors of its finalizer, as int64
FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_GROUP, _TOKEN, _SALT = range(3)  # what has factors of its own
_BEGUN = 63  # among the factors of an n-gram's parts, what comes behind the tokens


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer, int64; a shift to the right brings in zeros."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * FACTORS[0]
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * FACTORS[1]
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _factors(kind: int, count: int, device: torch.device) -> Tensor:
    """Odd numbers of 64 bits, int64: what is hashed together has a factor each. Made where they are needed."""
    return _mix((torch.arange(1, count + 1, device=device) + (kind << 32)) * GOLDEN) | 1


def tokens_before(like: Tensor, start: Tensor | None) -> Tensor:
    """int64 [S, b], how many tokens of its document are before each position of `like` [S, b, ...].

    start: int64 [b, S], where documents begin; None: all at 0.
    """
    position = torch.arange(len(like), device=like.device)[:, None].expand(like.shape[:2])
    return position if start is None else position - start.t()


def token_keys(values: Tensor) -> Tensor:
    """Values of groups int64 [..., G] to the tokens' keys int64 [...]."""
    return _mix(((values + 1) * _factors(_GROUP, values.shape[-1], values.device)).sum(-1))


def begun_keys(values: Tensor) -> Tensor:
    """Values of groups int64 [..., G] to keys of what is decided before each group but the first, [..., G - 1]."""
    parts = (values + 1) * _factors(_GROUP, values.shape[-1], values.device)
    return _mix(parts.cumsum(-1)[..., :-1])


def ngram_rows(memory: MemoryConfig, keys: Tensor, known: Tensor, begun: Tensor | None = None) -> Tensor:
    """Rows of the n-grams that end with each token.

    Args:
        keys: int64 [S, b], of the tokens in order.
        known: int64 [S, b], how many tokens may be looked at, the one of the position among them.
        begun: int64 [S, b, G - 1], keys of what comes behind the token: it is an n-gram's last part then.

    Returns:
        int64 [S, b, T], or [S, b, G - 1, T]; NOTHING where too few tokens are known.
    """
    token, salt = (_factors(kind, 64, keys.device) for kind in (_TOKEN, _SALT))
    found = []
    for i, order in enumerate(memory.orders):
        count = order if begun is None else order - 1
        key = torch.zeros_like(keys)
        for j in range(count):
            key = key + keys.roll(j, 0) * token[j]
        enough = known >= count
        if begun is not None:
            key, enough = key[..., None] + begun * token[_BEGUN], enough[..., None]
        for k in range(memory.hashes):
            table = i * memory.hashes + k
            row = (_mix(key + salt[table]) & (2**63 - 1)) % memory.rows + table * memory.rows
            found.append(torch.where(enough, row, NOTHING))
    return torch.stack(found, dim=-1)


class Memory(nn.Module):
    """The tables of `model.memory` at one place of the model, one under the other; zero at the start."""

    def __init__(self, config: Config, mcore: Any, tp_group: dist.ProcessGroup, width: int) -> None:
        super().__init__()
        from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

        self.settings = config.model.memory
        size = dist.get_world_size(tp_group)
        self.rows = config.model.memory.total_rows // size
        self.first = dist.get_rank(tp_group) * self.rows
        self.scatter, self.split, self.tp_group = mcore.sequence_parallel, size > 1, tp_group
        self.table = nn.Parameter(torch.empty(self.rows, width, dtype=mcore.params_dtype, device=init_device(mcore)))
        set_tensor_model_parallel_attributes(self.table, True, 0, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows int64 [S, ..., T] to the sums of their embeddings, [s, ..., width]."""
        from megatron.core.tensor_parallel.mappings import (
            reduce_from_tensor_model_parallel_region,
            reduce_scatter_to_sequence_parallel_region,
        )

        here = rows - self.first
        mine = (here >= 0) & (here < self.rows) & (rows >= 0)
        found = F.embedding(here.clamp(0, self.rows - 1), self.table)
        total = (found * mine[..., None]).sum(-2)
        if self.scatter:
            return reduce_scatter_to_sequence_parallel_region(total, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(total, group=self.tp_group) if self.split else total

    def of_ids(self, ids: Tensor, start: Tensor | None) -> Tensor:
        """Ids int64 [b, S], of which those before each position are known, to [s, b, width].

        start: int64 [b, S], where documents begin: the end of the one before is none of it; None: all at 0.
        """
        keys, known = token_keys(ids.t()[..., None]), tokens_before(ids.t(), start)
        return self(ngram_rows(self.settings, keys, known))


def make_memory(config: Config, mcore: Any, tp_group: dist.ProcessGroup, width: int) -> Memory | None:
    """With `model.memory.rows`."""
    return Memory(config, mcore, tp_group, width) if config.model.memory.rows else None
