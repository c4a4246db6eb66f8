"""The chain head: a block's tokens one after another, and a token's groups of bits one after another.

Give every group of bits its own noise level, and let the levels fall one after another instead of all together. When
they no longer overlap, each group is drawn in one step from its posterior given what is clean already, which is exact
for a group (diffusion/bit_groups.py); no noise is left, and the likelihood is exact by the chain rule. What stays of
the method: the backbone runs once for K tokens, and nothing has the size of the vocabulary.

All stages are trained at once. Stage i of a token decides its group i and sees the groups before it. Each token brings
the embedding of the one before it, and the head's attention is causal in a window that reaches into earlier blocks: the
backbone knows everything but the newest tokens, the head the newest tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bit.config import Config
from megatron_bit.diffusion.bit_groups import BitGroups
from megatron_bit.model.attention import RotaryEmbedding
from megatron_bit.model.bitlm import BitInput
from megatron_bit.model.chunk import BoundOutput, LossOutput, Place, TokenBatch
from megatron_bit.model.codec import Codec, RawCodec
from megatron_bit.model.head import BlockHead
from megatron_bit.model.layers import PARTIAL, earlier, init_device, linear, look_up, make_pairs, name_of, value_table
from megatron_bit.model.memory import begun_keys, make_memory, ngram_rows, token_keys, tokens_before
from megatron_bit.model.recompute import again


class ChainHead(BlockHead):
    """Cross-entropy of every token given the ones before it, group by group."""

    def __init__(self, config: Config, mcore: Any, tp_group: Any, groups: BitGroups) -> None:
        self.rope = RotaryEmbedding(config.model.rope_base)
        super().__init__(config, mcore, tp_group, groups.count * groups.values)
        w = config.model.head.hidden_size
        self.groups, self.remembers = groups, config.model.memory
        self.recompute = config.recompute_head
        self.previous = value_table(mcore, groups, w)  # of the token before
        self.pairs = make_pairs(config, mcore, groups, w)  # the same
        self.values = value_table(mcore, groups, w)  # of the token's own groups that are decided
        self.stage = nn.Parameter(torch.empty(groups.count, w, dtype=mcore.params_dtype, device=init_device(mcore)))
        setattr(self.stage, PARTIAL, mcore.sequence_parallel)
        self.memory = make_memory(config, mcore, tp_group, w)  # of the tokens before
        self.inner_memory = make_memory(config, mcore, tp_group, w) if groups.count > 1 else None  # and groups before
        m, rank = config.model, config.model.prior_rank
        self.told = value_table(mcore, groups, rank) if rank else None  # what the prior of a group hears of others
        if rank:
            self.tie = linear(mcore, m.hidden_size, rank)
            self.tie_last = linear(mcore, m.hidden_size, rank) if m.block_size > 1 else None
            self.tied = value_table(mcore, groups, rank)  # zero at the start, like the prior

    def forward(
        self,
        index: Tensor,
        previous: Tensor,
        known: Tensor,
        hidden: Tensor,
        start: Tensor | None = None,
        remembered: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """
        Args:
            index: int64 [s, b, G], values of the tokens' groups.
            previous: int64 [s, b, G], those of the tokens before.
            known: bool [s, b] or [s, 1], whether there is a token before.
            hidden: [s, b, D], the backbone's states.
            remembered: of `remember`.
            start: int64 [b, S], the first position that each token of the whole sequence may see; None: all before it.

        Returns:
            float32 [s, b, G], nats of every group.
        """
        g = self.groups
        own = look_up(self.values, index, g)
        before = name_of(self.previous, self.pairs, previous, g) * known[..., None]
        if remembered is not None:
            before = before + remembered[0]
        x = before[:, :, None] + own.cumsum(-2) - own  # stage i has the groups before i
        if remembered is not None and remembered[1] is not None:
            x = x + F.pad(remembered[1], (0, 0, 1, 0))
        prior, tie = self.prior_logits(hidden), self._tie(index, hidden)
        if self.recompute:
            parts = [slice(i, i + 1) for i in range(g.count)]
            return torch.cat([again(self._stages, part, x, index, hidden, prior, tie, start) for part in parts], dim=-1)
        return self._stages(slice(None), x, index, hidden, prior, tie, start)

    def remember(self, index: Tensor, known: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """What the memory has of the n-grams before each token [s, b, W], and of those that end inside it
        [s, b, G - 1, W], for each group but the first; None without one.

        index: int64 [S, b, G], of the whole sequence; known: int64 [S, b], tokens before each that may be looked at.
        """
        if self.memory is None:
            return None
        before = token_keys(index).roll(1, 0)
        inner = None
        if self.inner_memory is not None:
            inner = self.inner_memory(ngram_rows(self.remembers, before, known, begun_keys(index)))
        return self.memory(ngram_rows(self.remembers, before, known)), inner

    def _tie(self, index: Tensor, hidden: Tensor) -> Tensor | None:
        """What ties a token's groups in the prior, [s, b, G, rank]: the states times what is decided before each."""
        if self.told is None:
            return None
        told = earlier(look_up(self.told, index, self.groups))
        return self._both(self.tie, self.tie_last, hidden).flatten(0, 1) * told

    def _stages(
        self,
        part: slice,
        x: Tensor,
        index: Tensor,
        hidden: Tensor,
        prior: Tensor | float,
        tie: Tensor | None,
        start: Tensor | None,
    ) -> Tensor:
        """Nats of some of the groups, [s, b, their count]; x [s, b, G, W], the inputs of all stages; tie of `_tie`."""
        g = self.groups
        features = self.features(x[:, :, part], self.stage[part], hidden, start)
        weight = self.output.weight.unflatten(0, (g.count, g.values))
        logits = torch.einsum("sbgw,guw->sbgu", features, weight[part])
        if isinstance(prior, Tensor):
            logits = logits + prior.squeeze(2).unflatten(-1, (g.count, g.values))[:, :, part]
        if tie is not None:
            tied = self.tied.unflatten(0, (g.count, g.values))
            logits = logits + torch.einsum("sbgr,gur->sbgu", tie[:, :, part], tied[part])
        return self.kernels.group_cross_entropy(logits, index[..., part], g.invalid[part] if g.uneven else None)


class ChainLM(BitInput):
    """A BitLM with a chain head."""

    head: ChainHead | None

    def __init__(self, config: Config, place: Place, codec: Codec | RawCodec) -> None:
        super().__init__(config, place, codec)
        self.head = ChainHead(config, place.mcore, place.groups.tp, self.bit_groups) if place.last else None

    def loss(self, hidden: Tensor, batch: TokenBatch) -> LossOutput:
        """The exact negative log-likelihood in nats per token; loss and bound are the same."""
        loss = self._nats(self.condition(hidden, batch), batch).mean() / self.shards
        return LossOutput(loss, torch.stack((loss.detach(), loss.detach())))

    def bound(self, hidden: Tensor, batch: TokenBatch) -> BoundOutput:
        """The exact negative log-likelihood of every sample."""
        return self.of_samples(self._nats(hidden, batch), batch)

    def _nats(self, hidden: Tensor, batch: TokenBatch) -> Tensor:
        """float32 [s, b]."""
        assert self.head is not None
        tokens, start = batch.tokens, batch.start if self.masked else None
        first, last = self._bounds(tokens.shape[1])
        index = self.bit_groups.index(self.codec.encode(tokens.transpose(0, 1)))
        known = tokens_before(index, start)
        own, previous, before = (t[first:last] for t in (index, index.roll(1, 0), known > 0))
        return self.head(own, previous, before, hidden, start, self.head.remember(index, known)).sum(-1)
