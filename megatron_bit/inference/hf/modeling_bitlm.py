"""BitLM for transformers: the model, block-wise generation with a key/value cache, and likelihood scores.

Needs torch and transformers only. A token id is B bits of -1 and +1, in G groups that are decided together. A causal
backbone reads the bits one block of K tokens behind, so that row p of its states conditions token p; a small head
decides the K tokens of a block. A diffusion head takes the noise off all their bits together, in `steps` evaluations; a
chain head draws one group after another, in K G evaluations of one token. The backbone runs once a block.

A model with `vocab_size` 0 has no ids: its tokens are records of B bits, uint8 [..., ceil(B / 8)] with the highest bit
of a byte first. Where it says "ids int64 [b, S]" below, they are uint8 [b, S, ceil(B / 8)].

Shape letters: b rows, S tokens, n blocks, K block size, M noise levels of a block, B bits, G groups, U values of a
group, D width, W head width. Noise is a function of (seed, sequence, block), not of a generator's state: text does not
depend on the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.generic import ModelOutput

from .backbone_bitlm import BitLMModel, BitLMPreTrainedModel
from .bits_bitlm import fill_front
from .chain_bitlm import Chain
from .configuration_bitlm import BitLMConfig
from .front_bitlm import Front
from .generation_bitlm import BitLMGenerationMixin
from .head_bitlm import BitLMHead
from .noise_bitlm import RECONSTRUCTION, VALIDATION, NoiseDistribution, gaussian, stratified_levels
from .posterior_bitlm import Posterior

# transformers 4 copies the files that this one names, and not those that they name
from .embedding_bitlm import Memory  # noqa: F401  # isort: skip
from .settings_bitlm import Settings  # noqa: F401  # isort: skip
from .text_bitlm import Decoder  # noqa: F401  # isort: skip


@dataclass
class BitLMOutput(ModelOutput):
    """last_hidden_state [b, S + K, D]: row p conditions token p, the last K rows the block that is not there yet.
    logits [b, n, M, K, outputs]: the head's answer, if noisy bits were given."""

    last_hidden_state: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class BitLMScore(ModelOutput):
    """nats [b]: a bound on -ln p(row) (of a chain: its value), with the end-of-document tokens in the first block.
    nats_per_token [b, S]: each token's share of its block's bound (only whole blocks are bounds), 0 for padding."""

    nats: Tensor | None = None
    nats_per_token: Tensor | None = None


class BitLMForCausalLM(BitLMPreTrainedModel, BitLMGenerationMixin):
    """Backbone and head. `generate` and `score` are what it is for; `forward` gives the parts."""

    def __init__(self, config: BitLMConfig) -> None:
        super().__init__(config)
        self.model = BitLMModel(config)
        self.head = BitLMHead(config)
        self.noise, self.posterior = NoiseDistribution(config), Posterior(config)
        self.post_init()

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        noisy_bits: Tensor | None = None,
        log_sigma: Tensor | None = None,
    ) -> BitLMOutput:
        """States of a text, and with noisy bits the head's answer.

        Args:
            input_ids: int64 [b, S]. S is filled up in front to whole blocks (with end-of-document tokens), n of them.
            attention_mask: [b, S], 0 where a row has no token.
            noisy_bits: float32 [b, n, M, K, B], x + sigma eps for the n blocks of the text.
            log_sigma: float32 [b, n, M], ln sigma of each.

        A chain head has no noise: `score` gives its likelihoods.
        """
        k = self.config.block_size
        ids, lead = self._blocks(input_ids, attention_mask)
        states = self._states(ids, lead)
        logits = None
        if noisy_bits is not None and log_sigma is not None:
            newest = self._newest(ids, lead)
            logits = self._evaluate(noisy_bits, log_sigma, states[:, :-k].unflatten(1, (-1, k)), newest)
        return BitLMOutput(last_hidden_state=states, logits=logits)

    def compile_parts(self, **options: Any) -> None:
        """Compile what `generate` calls: the backbone's pass and the head's evaluation. `options` are torch.compile's;
        `fullgraph=True` holds, but more shapes than it makes graphs for are an error then, and run plainly without."""
        name = "groups" if self.config.head_kind == "chain" else "forward"
        for part, method in ((self.model, "forward"), (self.head, name)):
            setattr(part, method, torch.compile(getattr(part, method), **options))

    def _newest(self, ids: Tensor, lead: Tensor) -> Tensor | None:
        """Of ids [b, n K] and empty blocks in front [b]: what the head takes of the token before each block."""
        k, block = self.config.block_size, torch.arange(ids.shape[1] // self.config.block_size, device=ids.device)
        return self._values_before(fill_front(ids, k, 0)[:, k - 1 : -1 : k], block > lead[:, None])

    def _evaluate(self, z: Tensor, log_sigma: Tensor, states: Tensor, newest: Tensor | None) -> Tensor:
        """The head's answer to noisy bits alone: what it sees of its own estimate is made of them, as in validation."""
        outputs = self.head(z, log_sigma, states, None, newest)
        if not self.config.self_condition:
            return outputs
        logits = self.posterior.logits(outputs, z, log_sigma.exp()[..., None, None])
        return self.head(z, log_sigma, states, self.posterior.mean(logits), newest)

    @torch.no_grad()
    def score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        noise_samples: int = 4,
        seed: int = 0,
        sequence_ids: Tensor | None = None,
        overlap: float = 0.0,
    ) -> BitLMScore:
        """The likelihood bound in nats, as validation reports it: unbiased, with the noise of (seed, sequence).

        The value of a chain is exact, and `noise_samples` and `seed` have no part in it; but with `overlap` it is a
        bound too.

        Args:
            input_ids, attention_mask: int64 [b, S]; padding on either side.
            noise_samples: noise levels of a block; more make it less noisy.
            sequence_ids: int64 [b], keys of the noise; default 0, 1, ...
            overlap: of a chain that has learned from noisy blocks: the bound along a front of noise over so many groups
                of bits (1 or above; inf: all of a block together).

        Raises:
            ValueError: longer than the model was trained for; an overlap of another model.
        """
        if overlap:
            self._check_front("score", overlap)
        k = self.config.block_size
        ids, lead = self._blocks(input_ids, attention_mask)
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"score: {ids.shape[1]} tokens are more than the {self.config.max_position_embeddings} the model was "
                "trained at; score shorter pieces"
            )
        states = self._states(ids, lead)[:, :-k].unflatten(1, (-1, k))
        sequence = self._sequences(sequence_ids, len(ids))
        block = torch.arange(ids.shape[1] // k, device=ids.device) - lead[:, None]
        x = self.model.bits(ids).float().unflatten(1, (-1, k))[:, :, None]  # [b, n, 1, K, B]

        if overlap:
            nats = Front(self.head, self.model).bound(ids, states, block, sequence, overlap, noise_samples, seed)
        elif self.config.head_kind == "chain":
            nats = self._chain_nats(ids, states, block)
        else:
            nats = self._bound(x, states, self._newest(ids, lead), block, sequence, noise_samples, seed)
        nats = nats.masked_fill(block[..., None] < 0, 0.0).flatten(1)
        return BitLMScore(nats=nats.sum(1), nats_per_token=_where_given(nats, input_ids, attention_mask))

    def _bound(
        self,
        x: Tensor,
        states: Tensor,
        newest: Tensor | None,
        block: Tensor,
        sequence: Tensor,
        noise_samples: int,
        seed: int,
    ) -> Tensor:
        """x [b, n, 1, K, B] to each token's share, [b, n, K]."""
        k, bits = self.config.block_size, self.config.bits
        log_sigma = self.noise.log_sigma(stratified_levels(seed, VALIDATION, sequence, block, noise_samples))
        sigma = log_sigma.exp()[..., None, None]
        z = x + sigma * gaussian(seed, VALIDATION, sequence, block, noise_samples, k, bits)
        logits = self.posterior.logits(self._evaluate(z, log_sigma, states, newest), z, sigma)
        error = self.posterior.squared_error(logits, x).sum(-1)  # [b, n, M, K]
        integral = (error / (sigma.square() * self.noise.density(log_sigma)[..., None, None]).squeeze(-1)).mean(2)

        lowest = torch.full_like(log_sigma[..., :1], math.log(self.noise.sigma_min))
        sigma = lowest.exp()[..., None, None]
        z = x + sigma * gaussian(seed, RECONSTRUCTION, sequence, block, 1, k, bits)
        logits = self.posterior.logits(self._evaluate(z, lowest, states, newest), z, sigma)
        reconstruction = self.posterior.cross_entropy(logits, x).sum(-1).squeeze(2)  # [b, n, K]
        return integral + reconstruction + bits / (2.0 * self.noise.sigma_max**2)

    def _chain_nats(self, ids: Tensor, states: Tensor, block: Tensor) -> Tensor:
        """ids [b, n K], states [b, n, K, D], blocks' indices in their texts [b, n] to nats [b, n, K]."""
        k = self.config.block_size
        position = (block[..., None] * k + torch.arange(k, device=ids.device)).flatten(1)
        return Chain(self.head, self.model).read(ids, states, position).unflatten(1, (-1, k))

    def _states(self, ids: Tensor, lead: Tensor) -> Tensor:
        """ids [b, n K] and empty blocks in front [b] to the backbone's states [b, (n + 1) K, D]."""
        k = self.config.block_size
        position = torch.arange(ids.shape[1] + k, device=ids.device) - lead[:, None] * k
        return self.model(fill_front(ids, k, 0), position)


def _where_given(nats: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Values of right-aligned, filled-up rows back to where the tokens stood; 0 for padding."""
    length, have = input_ids.shape[1], nats.shape[1]
    nats = F.pad(nats, (length - have, 0))  # cuts, where negative
    if attention_mask is None:
        return nats
    mask = attention_mask.to(nats.device).bool()
    order = mask.int().argsort(dim=1, stable=True)
    return torch.zeros_like(nats).scatter(1, order, nats).masked_fill(~mask, 0.0)
