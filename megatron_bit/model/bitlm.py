"""BitLM: bits in, a denoising head and its loss out."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bit.config import Config
from megatron_bit.diffusion.bit_groups import BitGroups
from megatron_bit.diffusion.entropy_rate import EntropyRate
from megatron_bit.diffusion.likelihood import token_bound
from megatron_bit.diffusion.loss import LossTerms, denoising_loss
from megatron_bit.diffusion.noise import (
    APART,
    CONDITION,
    ESTIMATE,
    TRAIN,
    bit_flips,
    build_noise,
    chosen,
    gaussian,
    levels_apart,
    stratified_levels,
)
from megatron_bit.diffusion.philox import seed_key
from megatron_bit.diffusion.posterior import build_posterior
from megatron_bit.model.backbone import Backbone
from megatron_bit.model.chunk import BoundOutput, LossOutput, ModelChunk, Place, TokenBatch
from megatron_bit.model.codec import Codec, RawCodec
from megatron_bit.model.embedding import BitEmbedding
from megatron_bit.model.head import DenoisingHead, Newest
from megatron_bit.model.memory import ngram_rows, token_keys, tokens_before
from megatron_bit.model.recompute import again


class BitInput(ModelChunk):
    """Bits -> embedding -> backbone layers: what every model over bits begins with. The head is a subclass's."""

    embedding: BitEmbedding | None

    def __init__(self, config: Config, place: Place, codec: Codec | RawCodec) -> None:
        super().__init__(config, place)
        self.codec = codec
        self.bit_groups = BitGroups(config.model.group_sizes)
        self.embedding = BitEmbedding(config, place.mcore, place.groups.tp, self.bit_groups) if place.first else None
        self.backbone = Backbone(config, *place)

    @property
    def code_table(self) -> str:
        return self.codec.fingerprint

    def embed(self, tokens: Tensor, sample: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """Position p holds token p - K; the first K positions (of every document, if they are masked) are learned and
        their ids are not looked at.

        With `diffusion.context_noise` some bits of samples in training are flipped.
        """
        assert self.embedding is not None
        length, k, most = tokens.shape[1], self.settings.model.block_size, self.settings.diffusion.context_noise
        first, last = self._bounds(length)
        inputs = torch.cat((tokens[:, :k], tokens[:, : length - k]), dim=1)
        remembers = self.embedding.memory is not None
        begin, end = (0, length) if remembers else (first, last)  # n-grams reach into what other ranks hold
        bits = self.codec.encode(inputs[:, begin:end].transpose(0, 1))
        if most and sample is not None:
            seed, blocks = self.settings.train.seed, (end - begin) // k
            bits = torch.where(bit_flips(seed, sample, begin // k, blocks, k, bits.shape[-1], most), -bits, bits)
        start = start if self.masked else None
        remembered = self._remember(bits, start) if remembers else None
        rows = bits[first - begin : last - begin]
        return self.embedding(rows, first, None if start is None else start[:, first:last].t(), remembered)

    def _remember(self, bits: Tensor, start: Tensor | None) -> Tensor:
        """What the memory has of the input's n-grams, [s, b, D].

        bits: int8 [S, b, B], at the input positions; start: int64 [b, S], where their documents begin; None: at 0.
        """
        assert self.embedding is not None and self.embedding.memory is not None
        m = self.settings.model
        known = tokens_before(bits, start) - m.block_size + 1
        return self.embedding.memory(ngram_rows(m.memory, token_keys(self.bit_groups.index(bits)), known))

    def condition(self, hidden: Tensor, batch: TokenBatch) -> Tensor:
        """The states [s, b, D] that the head is conditioned on in training: zero where `diffusion.condition_drop` says.

        A head takes them through linear maps without a bias, each within its block: with the states of a block at zero
        they are not in its condition, its residual stream or its prior.
        """
        drop, k = self.settings.diffusion.condition_drop, self.settings.model.block_size
        if not drop:
            return hidden
        first, last = self._bounds(batch.tokens.shape[1])
        blocks = (last - first) // k
        dropped = chosen(self.settings.train.seed, CONDITION, batch.sample, first // k, blocks, 1, drop)
        return hidden * ~dropped.repeat_interleave(k, dim=0)

    def of_samples(self, nats: Tensor, batch: TokenBatch) -> BoundOutput:
        """Bounds of whole samples from those of the groups of this rank's tokens, float32 [s, b, G]."""
        k = self.settings.model.block_size
        mean = nats.unflatten(0, (-1, k)).sum(0).transpose(0, 1) * (k / batch.tokens.shape[1])
        if self.shards > 1:
            mean = mean.contiguous()
            dist.all_reduce(mean, group=self.tp_group)
        return BoundOutput.of(mean)

    def _bounds(self, length: int) -> tuple[int, int]:
        """First and last (exclusive) position of the sequence that this rank's activations hold."""
        part = length // self.shards
        return self.shard * part, (self.shard + 1) * part


class BitLM(BitInput):
    """The bits of a block denoised together."""

    def __init__(self, config: Config, place: Place, codec: Codec | RawCodec) -> None:
        super().__init__(config, place, codec)
        self.noise = build_noise(config, place.groups.device)
        self.noise_table = self.noise if isinstance(self.noise, EntropyRate) else None
        self.kernels = place.mcore.kernels
        self.posterior = build_posterior(config, self.kernels.bit_loss)
        self.head = DenoisingHead(config, place.mcore, place.groups.tp, self.posterior) if place.last else None

    @property
    def borrowed(self) -> list[Tensor]:
        return (
            [self.head.input.weight] if isinstance(self.head, DenoisingHead) else []
        )  # `loss` projects what it noises

    def loss(self, hidden: Tensor, batch: TokenBatch) -> LossOutput:
        """Draw noise for this rank's blocks, denoise, and average over the tokens of the whole sequence."""
        assert isinstance(self.head, DenoisingHead)
        d, k, seed = self.settings.diffusion, self.settings.model.block_size, self.settings.train.seed
        apart = d.levels_apart
        length = batch.tokens.shape[1]
        first, last = self._bounds(length)
        block, blocks, m = first // k, (last - first) // k, d.noise_samples - apart
        log_sigma = self.noise.log_sigma(stratified_levels(seed, TRAIN, batch.sample, block, blocks, m))
        ids, table = self.codec.rows(batch.tokens[:, first:last].transpose(0, 1))
        weight = None if self.settings.recompute_head else self.head.input.weight  # then it is projected in parts
        key = seed_key(seed, TRAIN)
        x, z, projected = self.kernels.noised_bits(ids, table, log_sigma, batch.sample, weight, key, block, k)
        share, x = d.self_condition, x[:, :, None]
        shown = chosen(seed, ESTIMATE, batch.sample, block, blocks, d.noise_samples, share) if share else None
        conditions = (self.condition(hidden, batch), self._newest(batch))
        terms = self._terms(z, x, log_sigma, *conditions, None if shown is None else shown[..., :m], projected)
        if apart:
            levels, z = self._apart(x, batch.sample, block, blocks)
            others = self._terms(z, x, levels, *conditions, None if shown is None else shown[..., m:], None)
            terms = LossTerms(*(torch.cat(parts, dim=-1) for parts in zip(terms, others, strict=True)))
        loss = terms.loss.mean() / self.shards
        metrics = torch.stack((loss.detach(), terms.bound.mean() / self.shards))
        if self.noise_table is not None:
            rate = terms.rate.unflatten(0, (blocks, k)).mean(1)  # the tokens of a block have one level
            metrics = torch.cat((metrics, self.noise_table.histogram(log_sigma, rate) / self.shards))
        return LossOutput(loss, metrics)

    def _apart(self, x: Tensor, sample: Tensor, block: int, blocks: int) -> tuple[Tensor, Tensor]:
        """Levels of their own for all groups of bits, ln sigma [s, b, M, G], and x [s, b, 1, B] with their noise,
        [s, b, M, B]; M: the evaluations that have them."""
        m, seed, count = self.settings.model, self.settings.train.seed, self.settings.diffusion.levels_apart
        k, groups = m.block_size, len(m.group_sizes)
        log_sigma = self.noise.log_sigma(levels_apart(seed, sample, block, blocks, count, k * groups))
        log_sigma = log_sigma.unflatten(-1, (k, groups)).permute(0, 3, 1, 2, 4).flatten(0, 1)
        eps = gaussian(seed, APART, sample, block, blocks, count, k, m.bits)
        return log_sigma, x + self.bit_groups.spread(log_sigma.exp()) * eps

    def _newest(self, batch: TokenBatch) -> Newest | None:
        """The tokens before this rank's blocks, for a head that looks at them."""
        if not self.settings.model.token_before:
            return None
        tokens, start = batch.tokens.transpose(0, 1), batch.start if self.masked else None
        first = torch.arange(*self._bounds(len(tokens)), self.settings.model.block_size, device=tokens.device)
        index = self.bit_groups.index(self.codec.encode(tokens[(first - 1).clamp(min=0)]))
        return Newest(index, tokens_before(tokens, start)[first] > 0)

    def _terms(
        self,
        z: Tensor,
        x: Tensor,
        log_sigma: Tensor,
        hidden: Tensor,
        newest: Newest | None,
        shown: Tensor | None,
        projected: Tensor | None,
    ) -> LossTerms:
        """The terms [s, b, M] from z float32 [s, b, M, B], x [s, b, 1, B], log_sigma as of the head, shown bool
        [n, b, M]. Of levels apart there is the loss alone, and no bound: that follows one level for the block.

        projected: [s, b, M, W], as of the head.
        """
        if not self.settings.recompute_head:
            return self._evaluate(z, x, log_sigma, hidden, newest, shown, projected)
        samples = range(log_sigma.shape[2])
        terms = [
            again(
                self._evaluate, z[:, :, i : i + 1], x, log_sigma[:, :, i : i + 1], hidden, newest,
                None if shown is None else shown[..., i : i + 1],
            )
            for i in samples
        ]  # fmt: skip
        return LossTerms(*(torch.cat(parts, dim=-1) for parts in zip(*terms, strict=True)))

    def _evaluate(
        self,
        z: Tensor,
        x: Tensor,
        log_sigma: Tensor,
        hidden: Tensor,
        newest: Newest | None,
        shown: Tensor | None,
        projected: Tensor | None = None,
    ) -> LossTerms:
        assert self.head is not None
        residual = self.head(z, log_sigma, hidden, shown, projected, newest)
        if log_sigma.dim() == 4:
            levels = self.bit_groups.spread(log_sigma)
            loss, _ = self.posterior.token_loss(residual, z, x, levels, self.settings.loss)
            return LossTerms(loss, loss[..., :0].detach(), loss[..., :0].detach())
        per_token = log_sigma.repeat_interleave(self.settings.model.block_size, dim=0)
        return denoising_loss(self.posterior, residual, z, x, per_token, self.noise, self.settings.loss)

    def bound(self, hidden: Tensor, batch: TokenBatch) -> BoundOutput:
        """The likelihood bound of every sample."""
        assert self.head is not None
        config, head = self.settings, self.head
        first, last = self._bounds(batch.tokens.shape[1])
        x = self.codec.encode(batch.tokens[:, first:last].transpose(0, 1)).float()[:, :, None, :]
        newest = self._newest(batch)
        nats = token_bound(
            lambda z, log_sigma: head(z, log_sigma, hidden, newest=newest),
            self.posterior,
            self.bit_groups,
            x,
            batch.sample,
            self.noise,
            seed=config.train.seed,
            first_block=first // config.model.block_size,
            block_size=config.model.block_size,
            noise_samples=config.evaluate.noise_samples,
        )
        return self.of_samples(nats, batch)
