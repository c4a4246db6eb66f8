"""BitLM: one pipeline chunk, from token ids or a received hidden state to a hidden state or the loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bit.config import Config
from megatron_bit.diffusion.likelihood import token_bound
from megatron_bit.diffusion.loss import denoising_loss
from megatron_bit.diffusion.noise import TRAIN, NoiseDistribution, gaussian, stratified_levels
from megatron_bit.model.backbone import Backbone, transformer_config
from megatron_bit.model.codec import Codec
from megatron_bit.model.embedding import BitEmbedding
from megatron_bit.model.head import DenoisingHead
from megatron_bit.model.init import initialize
from megatron_bit.model.layers import sum_partial_grads
from megatron_bit.parallel.groups import Groups


class TokenBatch(NamedTuple):
    """One micro-batch on the device."""

    tokens: Tensor  # int64 [b, S]
    sample: Tensor  # int64 [b], global sample indices: the key of the noise


class LossOutput(NamedTuple):
    """What the last chunk returns in training. Under sequence parallelism both are this rank's share over TP."""

    loss: Tensor  # float32 scalar, differentiable
    metrics: Tensor  # float32 [2], detached: loss, likelihood bound (nats per token)


class BoundOutput(NamedTuple):
    """What the last chunk returns in validation: the same on every TP rank."""

    loss: Tensor  # float32 scalar, the mean bound of the micro-batch
    metrics: Tensor  # float32 [3]: sum, sum of squares and count of the samples' bounds (nats per token)


class BitLM(nn.Module):
    """Bits -> MLP -> backbone layers -> head and loss; the first and last parts where this chunk has them."""

    def __init__(
        self,
        config: Config,
        mcore: Any,
        codec: Codec,
        groups: Groups,
        vp_stage: int | None,
        first: bool,
        last: bool,
    ) -> None:
        super().__init__()
        self.settings = config
        self.config = mcore  # the name under which megatron-core's schedules look it up
        self.codec = codec
        self.noise = NoiseDistribution.from_config(config.diffusion)
        self.shards = groups.dims.tp if groups.dims.sequence_parallel else 1
        self.shard = groups.tp_rank if groups.dims.sequence_parallel else 0
        self.tp_group = groups.tp
        self.embedding = BitEmbedding(config, mcore) if first else None
        self.backbone = Backbone(config, mcore, groups, vp_stage, first, last)
        self.head = DenoisingHead(config, mcore, groups.tp) if last else None

    def set_input_tensor(self, tensor: Tensor | list[Tensor]) -> None:
        """Receive the previous chunk's hidden state; called by megatron-core's schedules."""
        self.backbone.block.set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)

    def forward(self, batch: TokenBatch) -> Tensor | LossOutput | BoundOutput:
        """The hidden state [s, b, D], or on the last chunk the loss of the micro-batch."""
        hidden = self.hidden(batch.tokens)
        if self.head is None:
            return hidden
        return self.loss(hidden, batch) if self.training else self.bound(hidden, batch)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Backbone states of this chunk; row p conditions token p. tokens int64 [b, S] to [s, b, D]."""
        length = tokens.shape[1]
        x = None
        if self.embedding is not None:
            first, last = self._bounds(length)
            k = self.settings.model.block_size
            # position p holds token p - K; the first K positions are learned and their ids are not looked at
            inputs = torch.cat((tokens[:, :k], tokens[:, : length - k]), dim=1)[:, first:last]
            x = self.embedding(self.codec.encode(inputs.t()), first)
        return self.backbone(x)

    def loss(self, hidden: Tensor, batch: TokenBatch) -> LossOutput:
        """Draw noise for this rank's blocks, denoise, and average over the tokens of the whole sequence."""
        assert self.head is not None
        d, k, seed = self.settings.diffusion, self.settings.model.block_size, self.settings.train.seed
        length = batch.tokens.shape[1]
        first, last = self._bounds(length)
        block, blocks, m = first // k, (last - first) // k, d.noise_samples
        log_sigma = self.noise.log_sigma(stratified_levels(seed, TRAIN, batch.sample, block, blocks, m))
        eps = gaussian(seed, TRAIN, batch.sample, block, blocks, m, k, self.settings.model.bits)
        x = self.codec.encode(batch.tokens[:, first:last].t()).float()[:, :, None, :]
        per_token = log_sigma.repeat_interleave(k, dim=0)
        z = x + per_token.exp()[..., None] * eps
        residual = self.head(z, log_sigma, hidden)
        terms = denoising_loss(residual, z, x, per_token, self.noise, d.loss)
        loss = terms.loss.mean() / self.shards
        return LossOutput(loss, torch.stack((loss.detach(), terms.bound.mean() / self.shards)))

    def bound(self, hidden: Tensor, batch: TokenBatch) -> BoundOutput:
        """The likelihood bound of every sample."""
        assert self.head is not None
        config, head = self.settings, self.head
        first, last = self._bounds(batch.tokens.shape[1])
        x = self.codec.encode(batch.tokens[:, first:last].t()).float()[:, :, None, :]
        nats = token_bound(
            lambda z, log_sigma: head(z, log_sigma, hidden),
            x,
            batch.sample,
            self.noise,
            seed=config.train.seed,
            first_block=first // config.model.block_size,
            block_size=config.model.block_size,
            noise_samples=config.evaluate.noise_samples,
        )
        per_sample = nats.sum(0) / batch.tokens.shape[1]
        if self.shards > 1:
            dist.all_reduce(per_sample, group=self.tp_group)
        count = torch.full_like(per_sample[0], len(per_sample))
        return BoundOutput(per_sample.mean(), torch.stack((per_sample.sum(), per_sample.square().sum(), count)))

    def _bounds(self, length: int) -> tuple[int, int]:
        """First and last (exclusive) position of the sequence that this rank's activations hold."""
        part = length // self.shards
        return self.shard * part, (self.shard + 1) * part


def build_model(config: Config, vocab_size: int, groups: Groups) -> list[BitLM]:
    """This rank's chunks (more than one only with vpp > 1), initialised by parameter name, on the device.

    Raises:
        UserError: the vocabulary does not fit the bits.
    """
    from megatron.core.enums import ModelType

    dims = groups.dims
    codec = Codec(config.model.code, vocab_size, config.model.bits).to(groups.device)
    mcore = transformer_config(config, groups)
    chunks = []
    for vp in range(dims.vpp):
        first = groups.is_first_stage and vp == 0
        last = groups.is_last_stage and vp == dims.vpp - 1
        chunk = BitLM(config, mcore, codec, groups, vp if dims.vpp > 1 else None, first, last)
        chunk.model_type = ModelType.encoder_or_decoder  # type: ignore[assignment]  # asked for by the schedules
        initialize(chunk, config, groups)
        sum_partial_grads(chunk, groups.tp)
        chunks.append(chunk.to(groups.device))
    return chunks
