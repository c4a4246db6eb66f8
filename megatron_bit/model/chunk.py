"""One pipeline chunk of a model: what every kind of model has, and what training asks of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from megatron_bit.config import Config
from megatron_bit.diffusion.entropy_rate import BINS, EntropyRate
from megatron_bit.model.backbone import Backbone
from megatron_bit.parallel.groups import Groups


class TokenBatch(NamedTuple):
    """One micro-batch on the device."""

    tokens: Tensor  # int64 [b, S]; raw records: uint8 [b, S, ceil(B / 8)]
    sample: Tensor  # int64 [b], global sample indices: the key of the noise
    start: Tensor | None = None  # int64 [b, S], where each token's document begins in the sample; None: nobody asks


class LossOutput(NamedTuple):
    """What the last chunk returns in training."""

    loss: Tensor  # float32 scalar, differentiable; its gradients, summed where they are partial, are the micro-batch's
    metrics: Tensor  # float32 [2], detached: loss, likelihood bound (nats per token); under SP a share, the sum over TP
    # [2 + 2 BINS] if the model has a noise table: its histogram of these draws


class BoundOutput(NamedTuple):
    """What the last chunk returns in validation: the same on every TP rank."""

    loss: Tensor  # float32 scalar, the mean bound of the micro-batch
    metrics: Tensor  # float32 [b, K, G], nats of each sample's tokens by their place in the block and by group of bits

    @classmethod
    def of(cls, nats: Tensor) -> BoundOutput:
        """From the means over the blocks of each sample, float32 [b, K, G]."""
        return cls(nats.sum(-1).mean(), nats)

    @property
    def per_sample(self) -> Tensor:
        """float32 [b], the bound of each sample (nats per token)."""
        return self.metrics.sum(-1).mean(-1)


class Place(NamedTuple):
    """Which chunk of the model one is, and what it is built with."""

    mcore: Any  # megatron-core's TransformerConfig
    groups: Groups
    vp_stage: int | None  # with several chunks a rank
    first: bool  # has the embedding
    last: bool  # has the head


class ModelChunk(nn.Module, ABC):
    """Embedding, backbone layers, head: those this chunk has. A kind of model is a subclass with its own ends."""

    embedding: nn.Module | None  # on the first chunk
    backbone: Backbone
    head: nn.Module | None  # on the last chunk
    noise_table: EntropyRate | None = None  # the density of noise levels, if it is measured; on every chunk

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        groups = place.groups
        self.settings = config
        self.config = place.mcore  # the name under which megatron-core's schedules look it up
        self.shards = groups.dims.tp if groups.dims.sequence_parallel else 1
        self.shard = groups.tp_rank if groups.dims.sequence_parallel else 0
        self.tp_group = groups.tp

    def set_input_tensor(self, tensor: Tensor | list[Tensor]) -> None:
        """Receive the previous chunk's hidden state; called by megatron-core's schedules."""
        self.backbone.block.set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)

    def forward(self, batch: TokenBatch) -> Tensor | LossOutput | BoundOutput:
        """The hidden state [s, b, D], or on the last chunk the loss of the micro-batch."""
        hidden = self.hidden(batch.tokens, batch.sample if self.training else None, batch.start)
        if self.head is None:
            return hidden
        return self.loss(hidden, batch) if self.training else self.bound(hidden, batch)

    def hidden(self, tokens: Tensor, sample: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """Backbone states of this chunk; row p conditions token p. tokens int64 [b, S] to [s, b, D].

        sample: int64 [b], in training: the key of what may be wrong with the input there.
        start: int64 [b, S], as of TokenBatch.
        """
        return self.backbone(None if self.embedding is None else self.embed(tokens, sample, start), start)

    @property
    def masked(self) -> bool:
        """Whether a token sees nothing of other documents than its own."""
        return self.settings.data.document_boundaries == "mask"

    @property
    def borrowed(self) -> list[Tensor]:
        """Parameters that `forward` uses outside of the module that owns them: ZeRO-3 has to be told of them."""
        return []

    @property
    @abstractmethod
    def code_table(self) -> str:
        """Fingerprint of how ids become bits: part of what a run is."""

    @abstractmethod
    def embed(self, tokens: Tensor, sample: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """int64 [b, S] to the layers' input [s, b, D], of which row p may know the tokens before p's block alone.

        sample: int64 [b], in training.
        start: int64 [b, S], as of TokenBatch; if `masked`, row p may know only those of them from there on.
        """

    @abstractmethod
    def loss(self, hidden: Tensor, batch: TokenBatch) -> LossOutput:
        """The training loss of the micro-batch, from the last layer's [s, b, D]."""

    @abstractmethod
    def bound(self, hidden: Tensor, batch: TokenBatch) -> BoundOutput:
        """The likelihood bound of every sample, from the last layer's [s, b, D]."""


def noise_tables(chunks: Iterable[nn.Module]) -> list[EntropyRate]:
    """The noise table of each chunk, all the same; none if the distribution is not measured."""
    return [c.noise_table for c in chunks if isinstance(c, ModelChunk) and c.noise_table is not None]


def num_metrics(chunks: Iterable[nn.Module]) -> int:
    """Length of `LossOutput.metrics`, also where the loss is not computed."""
    return 2 + 2 * BINS if noise_tables(chunks) else 2
