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

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bit.config import Config
from megatron_bit.diffusion.bit_groups import BitGroups
from megatron_bit.diffusion.front import drawn_progress, progress
from megatron_bit.diffusion.noise import (
    BEHIND,
    RECONSTRUCTION,
    VALIDATION,
    NoiseDistribution,
    gaussian,
    stratified_levels,
)
from megatron_bit.diffusion.posterior import GroupPosterior
from megatron_bit.model.attention import RotaryEmbedding
from megatron_bit.model.bitlm import BitInput
from megatron_bit.model.chunk import BoundOutput, LossOutput, Place, TokenBatch
from megatron_bit.model.codec import Codec, RawCodec
from megatron_bit.model.head import BlockHead
from megatron_bit.model.layers import PARTIAL, earlier, init_device, linear, look_up, make_pairs, name_of, value_table
from megatron_bit.model.memory import NOTHING, begun_keys, make_memory, ngram_rows, token_keys, tokens_before
from megatron_bit.model.noisy import NoisyBlocks, NoisyPlace, SeenLevels, every_block, known_before, one_in, take
from megatron_bit.model.recompute import again


class Remembered(NamedTuple):
    """What the memory has of tokens."""

    tokens: Tensor  # [s, b, W], of the n-grams before each
    inner: Tensor | None  # [s, b, G - 1, W], of those that end inside it, for each group but the first


class Before(NamedTuple):
    """What there is before tokens."""

    index: Tensor  # int64 [s, b, G], values of the groups of the token before each
    known: Tensor  # bool [s, b], whether there is one
    start: Tensor | None  # int64 [b, S], the first position that each of the sequence may see; None: all before it
    remembered: Remembered | None
    behind: Remembered | None  # of noisy blocks


class ChainHead(BlockHead):
    """Cross-entropy of every token given the ones before it, group by group."""

    def __init__(self, config: Config, mcore: Any, tp_group: Any, groups: BitGroups) -> None:
        self.rope = RotaryEmbedding(config.model.rope_base)
        super().__init__(config, mcore, tp_group, groups.count * groups.values)
        w = config.model.head.hidden_size
        self.groups, self.remembers = groups, config.model.memory
        self.posterior = GroupPosterior(groups, matched=True)
        self.seen_levels = SeenLevels(mcore, w, groups.count) if config.noisy_every else None
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
        before: Before,
        hidden: Tensor,
        noisy: NoisyBlocks | None = None,
        logits: bool = False,
    ) -> Tensor:
        """
        Args:
            index: int64 [s, b, G], values of the tokens' groups.
            hidden: [s, b, D], the backbone's states.
            noisy: blocks to evaluate once more.

        Returns:
            float32 [s, b, G], nats of every group; with `noisy` [s + q K, b, G], those of these blocks behind. With
            `logits` [..., G, U], unnormalised log-probabilities of their values, instead.
        """
        given = self._given(index, before, hidden, noisy)
        if logits:
            return self._logits(slice(None), *given[1:])
        if self.recompute:
            parts = [slice(i, i + 1) for i in range(self.groups.count)]
            return torch.cat([again(self._nats, part, *given) for part in parts], dim=-1)
        return self._nats(slice(None), *given)

    def _given(self, index: Tensor, before: Before, hidden: Tensor, noisy: NoisyBlocks | None) -> tuple[Any, ...]:
        """What `_nats` takes of all stages."""
        g, prior, level = self.groups, self.prior_logits(hidden), self.stage
        name = name_of(self.previous, self.pairs, before.index, g) * before.known[..., None]
        x = _inputs(name, look_up(self.values, index, g), before.remembered)
        told = None if self.told is None else look_up(self.told, index, g)
        if noisy is not None:
            rows = noisy.place.rows
            index, hidden = (torch.cat((t, take(t, rows))) for t in (index, hidden))
            if isinstance(prior, Tensor):
                prior = torch.cat((prior, take(prior, rows)))
            likely = self._likely(noisy, index[-len(rows) :], prior)
            name_before = self._names_before(likely, take(name, rows))
            x = torch.cat((x, _inputs(name_before, g.mean(self.values, likely), before.behind)))
            told = None if self.told is None or told is None else torch.cat((told, g.mean(self.told, likely)))
            level = level + self._levels(noisy, len(name))
        tie = None if told is None else self._both(self.tie, self.tie_last, hidden).flatten(0, 1) * earlier(told)
        return index, x, level, hidden, prior, tie, before.start, None if noisy is None else noisy.place

    def _likely(self, noisy: NoisyBlocks, index: Tensor, prior: Tensor | float) -> Tensor:
        """What is seen of the groups of noisy blocks: the probabilities of their values, [q K, b, G, U], by their noisy
        bits and the prior; of what is decided all on its value.

        index: int64 [q K, b, G]; prior: [s + q K, b, 1, outputs].
        """
        g = self.groups
        weighed = prior[-len(index) :].squeeze(2) if isinstance(prior, Tensor) else None
        likely = self.posterior.likely(noisy.z, g.spread(noisy.log_sigma).exp(), weighed)
        own = index[..., None] == torch.arange(g.values, device=index.device)  # one_hot would wait for the device
        return torch.where(noisy.mine[..., None], own.to(likely.dtype), likely).to(self.values.dtype)

    def _names_before(self, likely: Tensor, clean: Tensor) -> Tensor:
        """The mean names [q K, b, W] of the tokens before those of noisy blocks; before a block's first one stands the
        newest decided token: clean [q K, b, W]."""
        name = likely.flatten(-2) @ self.previous
        name = name if self.pairs is None else name + self.pairs.expected(likely)
        name, clean = (t.unflatten(0, (-1, self.block_size)) for t in (name, clean))
        return torch.cat((clean[:, :1], name[:, :-1]), dim=1).flatten(0, 1)

    def _levels(self, noisy: NoisyBlocks, length: int) -> Tensor:
        """What rows are told of the noise on what they see, [n + q, K, b, G, W]: nothing for the first `length`."""
        assert self.seen_levels is not None
        told = self.seen_levels(noisy.log_sigma, noisy.mine, self.block_size).unflatten(0, (-1, self.block_size))
        return F.pad(told, (0, 0, 0, 0, 0, 0, 0, 0, length // self.block_size, 0))

    def remember(self, index: Tensor, known: Tensor, noisy: NoisyBlocks | None = None) -> Remembered | None:
        """What the memory has of the n-grams before each token, and of those that end inside it; None without one.

        Args:
            index: int64 [S, b, G], of the whole sequence.
            known: int64 [S, b], tokens before each that may be looked at.
            noisy: of these blocks instead, where only what is decided may be.
        """
        if self.memory is None:
            return None
        before = token_keys(index).roll(1, 0)
        rows = [ngram_rows(self.remembers, before, known)]
        if self.inner_memory is not None:
            rows.append(ngram_rows(self.remembers, before, known, begun_keys(index)))
        if noisy is not None:
            rows = [take(t, noisy.place.positions) for t in rows]
            begun = noisy.decided.cumprod(-1)[..., :-1] > 0
            rows[1:] = [torch.where(begun[..., None], t, NOTHING) for t in rows[1:]]
        return Remembered(self.memory(rows[0]), None if self.inner_memory is None else self.inner_memory(rows[1]))

    def _nats(self, part: slice, index: Tensor, *given: Any) -> Tensor:
        """Nats of some of the groups, float32 [s, b, their count]; index int64 [s, b, G]."""
        g = self.groups
        logits = self._logits(part, *given)
        return self.kernels.group_cross_entropy(logits, index[..., part], g.invalid[part] if g.uneven else None)

    def _logits(
        self,
        part: slice,
        x: Tensor,
        level: Tensor,
        hidden: Tensor,
        prior: Tensor | float,
        tie: Tensor | None,
        start: Tensor | None,
        noisy: NoisyPlace | None,
    ) -> Tensor:
        """Logits of some of the groups, [s, b, their count, U], from what all have: x [s, b, G, W] goes in, level
        [..., G, W] tells stages apart, tie [s, b, G, rank] is what ties the prior of a group to those before it."""
        g = self.groups
        features = self.features(x[:, :, part], level[..., part, :], hidden, start, noisy)
        weight = self.output.weight.unflatten(0, (g.count, g.values))
        logits = torch.einsum("sbgw,guw->sbgu", features, weight[part])
        if isinstance(prior, Tensor):
            logits = logits + prior.squeeze(2).unflatten(-1, (g.count, g.values))[:, :, part]
        if tie is not None:
            tied = self.tied.unflatten(0, (g.count, g.values))
            logits = logits + torch.einsum("sbgr,gur->sbgu", tie[:, :, part], tied[part])
        return logits


def _inputs(before: Tensor, own: Tensor, remembered: Remembered | None) -> Tensor:
    """What goes into the stages of tokens, [s, b, G, W]: stage i has the token before and the groups before i.

    before: [s, b, W]; own: [s, b, G, W].
    """
    if remembered is not None:
        before = before + remembered.tokens
    x = before[:, :, None] + earlier(own)
    if remembered is not None and remembered.inner is not None:
        x = x + F.pad(remembered.inner, (0, 0, 1, 0))
    return x


class ChainLM(BitInput):
    """A BitLM with a chain head."""

    head: ChainHead | None

    def __init__(self, config: Config, place: Place, codec: Codec | RawCodec) -> None:
        super().__init__(config, place, codec)
        self.head = ChainHead(config, place.mcore, place.groups.tp, self.bit_groups) if place.last else None
        self.noise = NoiseDistribution.from_config(config.diffusion)
        self.block_size = config.model.block_size

    def loss(self, hidden: Tensor, batch: TokenBatch) -> LossOutput:
        """The mean over all evaluations, nats a token; as the bound the exact negative log-likelihood."""
        every, k, (samples, length) = self.settings.noisy_every, self.block_size, batch.tokens.shape[:2]
        noisy, seed = None, self.settings.train.seed
        if every:
            place = one_in(every, batch.sample, length // k, self.shards, self.shard, k)
            come = drawn_progress(seed, batch.sample, place.block, k * self.bit_groups.count)
            block = place.block[place.mine]
            eps = gaussian(seed, BEHIND, batch.sample, block, len(block), 1, k, self.settings.model.bits)
            noisy = self._noised(batch, place, come, eps.squeeze(2))
        nats = self._evaluate(self.condition(hidden, batch), batch, noisy).sum(-1)
        exact = nats[: length // self.shards].sum() / (length * samples)
        loss = exact
        if noisy is not None:
            again = nats[length // self.shards :] * noisy.place.counts.repeat_interleave(k, dim=0)
            evaluated = length + -(-length // (k * every)) * k
            loss = (exact * length + again.sum() / samples) / evaluated
        return LossOutput(loss, torch.stack((loss.detach(), exact.detach())))

    def bound(self, hidden: Tensor, batch: TokenBatch) -> BoundOutput:
        """The exact negative log-likelihood of every sample."""
        return self.of_samples(self._evaluate(hidden, batch), batch)

    def front_bound(self, hidden: Tensor, batch: TokenBatch, overlap: float) -> BoundOutput:
        """The likelihood bound of every sample along a front (diffusion/front.py), unbiased over the noise.

        overlap: of groups of bits, at least 1, or inf. The front is looked at `evaluate.noise_samples` times a block.
        """
        k, seed, groups = self.block_size, self.settings.train.seed, self.bit_groups
        (samples, length), count = batch.tokens.shape[:2], self.settings.evaluate.noise_samples
        place = every_block(samples, length // k, self.shards, self.shard, k, batch.tokens.device)
        block, x = place.block[place.mine], self._bits(batch, place)
        keys = (batch.sample, block, len(block))
        eps = gaussian(seed, VALIDATION, *keys, count, k, x.shape[-1])
        t = stratified_levels(seed, VALIDATION, batch.sample, 0, length // k, count)
        assert self.head is not None
        posterior = self.head.posterior
        speed = 1.0 if math.isinf(overlap) else (k * groups.count - 1 + overlap) / overlap
        total, logits = torch.zeros_like(groups.sums(x)), x
        for i in range(count):
            come = progress(t[..., i], k * groups.count, overlap)
            noisy = self._noised(batch, place, come, eps[:, :, i])
            logits = self._evaluate(hidden, batch, noisy, logits=True).flatten(-2)
            sigma = groups.spread(noisy.log_sigma.exp())
            error = groups.sums(posterior.squared_error(posterior.logits(logits[len(x) :], noisy.z, sigma), x))
            moving = _of_tokens(((come > 0) & (come < 1))[place.mine], k)
            weight = moving / (noisy.log_sigma.exp().square() * self.noise.density(noisy.log_sigma))
            total = total + error * weight * (speed / count)
        sigma = torch.full_like(x[..., :1], self.noise.sigma_min)
        z = x + sigma * gaussian(seed, RECONSTRUCTION, *keys, 1, k, x.shape[-1]).squeeze(2)
        read = posterior.cross_entropy(posterior.logits(logits[: len(x)], z, sigma), x)  # all before is decided
        above = groups.sums(torch.full_like(x, 0.5 / self.noise.sigma_max**2))
        return self.of_samples(total + read + above, batch)

    def _evaluate(
        self, hidden: Tensor, batch: TokenBatch, noisy: NoisyBlocks | None = None, logits: bool = False
    ) -> Tensor:
        """What the head has of this rank's tokens, and of noisy blocks; shapes as of `ChainHead.forward`."""
        assert self.head is not None
        tokens, start = batch.tokens, batch.start if self.masked else None
        first, last = self._bounds(tokens.shape[1])
        index = self.bit_groups.index(self.codec.encode(tokens.transpose(0, 1)))
        known = tokens_before(index, start)
        before = Before(
            index.roll(1, 0)[first:last],
            known[first:last] > 0,
            start,
            self.head.remember(index, known),
            None if noisy is None else self.head.remember(index, known_before(known, noisy), noisy),
        )
        return self.head(index[first:last], before, hidden, noisy, logits)

    def _noised(self, batch: TokenBatch, place: NoisyPlace, come: Tensor, eps: Tensor) -> NoisyBlocks:
        """come: float32 [Q, b, K G], how far all groups have come; eps: float32 [q K, b, B]."""
        k = self.block_size
        log_sigma = self.noise.log_sigma(1.0 - _of_tokens(come[place.mine], k))
        z = self._bits(batch, place) + self.bit_groups.spread(log_sigma.exp()) * eps
        z = z * self.bit_groups.spread(_of_tokens(come[place.mine] > 0, k))  # of what is not begun nothing is known
        return NoisyBlocks(place, _of_tokens(come >= 1, k), log_sigma, z)

    def _bits(self, batch: TokenBatch, place: NoisyPlace) -> Tensor:
        """float32 [q K, b, B], of the tokens of this rank's noisy blocks."""
        return self.codec.encode(take(batch.tokens.transpose(0, 1), place.rows + place.first)).float()


def _of_tokens(x: Tensor, block_size: int) -> Tensor:
    """What groups of blocks have, [n, b, K G], to those of tokens, [n K, b, G]."""
    return x.unflatten(-1, (block_size, -1)).transpose(1, 2).flatten(0, 1)
