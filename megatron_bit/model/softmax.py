"""The autoregressive peer: a token table in, a softmax over the vocabulary out, on BitLM's backbone.

It is what BitLM is compared with, so everything but the two ends is shared: layers, data order, optimizer,
checkpoints, evaluation. Both ends are split over TP by rows of the vocabulary, padded to a multiple of 128 whatever
the layout. Padded rows begin at zero, get no probability and no gradient, and so stay zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bit.config import Config
from megatron_bit.model.backbone import Backbone
from megatron_bit.model.chunk import BoundOutput, LossOutput, ModelChunk, Place, TokenBatch
from megatron_bit.model.memory import make_memory


class TokenEmbedding(nn.Module):
    """Token ids to hidden states; each TP rank looks up the ids of its rows, and the sum over TP has all of them."""

    def __init__(self, config: Config, mcore: Any, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

        m = config.model
        self.scatter = mcore.sequence_parallel
        nothing: Any = None  # weights are drawn by name (model/init.py)
        self.table = VocabParallelEmbedding(
            m.padded_vocab_size,
            m.hidden_size,
            init_method=nothing,
            reduce_scatter_embeddings=self.scatter,
            config=mcore,
            tp_group=tp_group,
        )
        self.memory = make_memory(config, mcore, tp_group, m.hidden_size)

    def forward(self, ids: Tensor, start: Tensor | None = None) -> Tensor:
        """int64 [b, S] to [s, b, D]; start: int64 [b, S], where documents begin, for the memory; None: all at 0."""
        x = self.table(ids if self.scatter else ids.t())  # megatron-core turns it around before it scatters
        return x if self.memory is None else x + self.memory.of_ids(ids, start)


class SoftmaxHead(nn.Module):
    """Cross-entropy of the tokens; no rank ever holds more than its part of the vocabulary."""

    def __init__(self, config: Config, mcore: Any, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear

        m = config.model
        assert m.vocab_size is not None
        nothing: Any = None
        self.logits = ColumnParallelLinear(
            m.hidden_size,
            m.padded_vocab_size,
            config=mcore,
            init_method=nothing,
            bias=False,
            gather_output=False,
            tp_group=tp_group,
        )
        rows = m.padded_vocab_size // dist.get_world_size(tp_group)
        self.valid = min(rows, max(0, m.vocab_size - dist.get_rank(tp_group) * rows))  # rows of this rank that are ids

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """
        Args:
            hidden: [s, b, D], the state that conditions each token.
            tokens: int64 [b, S].

        Returns:
            float32 [S, b], nats of each token: of the whole sequence, and the same on every TP rank.
        """
        from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

        logits, _ = self.logits(hidden)  # [S, b, V_padded / tp]: under sequence parallelism it gathers first
        with torch.no_grad():  # their gradient is zero already, and autograd would copy all the others for it
            logits[..., self.valid :] = float("-inf")
        return vocab_parallel_cross_entropy(logits, tokens.t().contiguous())


class SoftmaxLM(ModelChunk):
    """Token table -> backbone layers -> projection and cross-entropy; the ends where this chunk has them."""

    def __init__(self, config: Config, place: Place, eos_id: int) -> None:
        """eos_id: what stands before the first token of a sample."""
        super().__init__(config, place)
        mcore, tp = place.mcore, place.groups.tp
        self.eos_id = eos_id
        self.embedding = TokenEmbedding(config, mcore, tp) if place.first else None
        self.backbone = Backbone(config, *place)
        self.head = SoftmaxHead(config, mcore, tp) if place.last else None

    @property
    def code_table(self) -> str:
        return "none"

    def embed(self, tokens: Tensor, sample: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """Position p holds token p - 1, position 0 the end of a document: what transformers' models can repeat.

        So does the first position of every document, whatever is in the one before.
        """
        assert self.embedding is not None
        before = torch.cat((torch.full_like(tokens[:, :1], self.eos_id), tokens[:, :-1]), dim=1)
        return self.embedding(before, start if self.masked else None)

    def loss(self, hidden: Tensor, batch: TokenBatch) -> LossOutput:
        """The exact cross-entropy, which is both the loss and the bound.

        Unlike the diffusion loss it is not a share under sequence parallelism: each rank's backward pass goes through
        its part of the vocabulary, and the layers below get the sum.
        """
        assert self.head is not None
        loss = self.head(hidden, batch.tokens).mean()
        share = loss.detach() / self.shards
        return LossOutput(loss, torch.stack((share, share)))

    def bound(self, hidden: Tensor, batch: TokenBatch) -> BoundOutput:
        """The exact cross-entropy of every sample, without noise."""
        assert self.head is not None
        return BoundOutput.of(self.head(hidden, batch.tokens).mean(0)[:, None, None])
