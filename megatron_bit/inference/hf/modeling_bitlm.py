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
from .logits_bitlm import NextTokens
from .noise_bitlm import RECONSTRUCTION, VALIDATION, NoiseDistribution, gaussian, stratified_levels
from .posterior_bitlm import Posterior

# transformers 4 copies the files that this one names, and not those that they name
from .embedding_bitlm import Memory  # noqa: F401  # isort: skip
from .settings_bitlm import Settings  # noqa: F401  # isort: skip
from .tokenwise_bitlm import Tokenwise  # noqa: F401  # isort: skip
from .text_bitlm import Decoder  # noqa: F401  # isort: skip


@dataclass
class BitLMOutput(ModelOutput):
    """loss: mean nats of the labels. logits: of a chain [b, S, V], log-probabilities of the token behind each; where
    noisy bits were given the head's answer [b, n, M, K, outputs]. last_hidden_state [b, n K + K, D]: row p conditions
    token p, the last K rows the block that is not there yet."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None


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
        labels: Tensor | None = None,
        noisy_bits: Tensor | None = None,
        log_sigma: Tensor | None = None,
        *,
        output_logits: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> BitLMOutput:
        """Of a chain the next token's log-probabilities, and the loss of labels; a diffusion head's answer to noise.

        A chain's blocks are counted from a row's first token, so that logits[:, i] depends on the tokens up to i alone
        (`score(blocks="start")` has the same nats). Their price: see docs/inference.md.

        Args:
            input_ids: int64 [b, S]; padding on either side.
            attention_mask: [b, S], 0 where a row has no token.
            labels: int64 [b, S], -100 or the ids themselves; shifted here, as everywhere in transformers.
            noisy_bits: float32 [b, n, M, K, B], x + sigma eps for the n blocks of the text, counted from its end: it is
                filled up in front with end-of-document tokens.
            log_sigma: float32 [b, n, M], ln sigma of each.
            output_logits: default: unless there are labels.
            logits_to_keep: of the last so many columns; 0: of all.
            num_items_in_batch: what the loss is a mean over, where it is not the labels given here.
            use_cache, return_dict: changes nothing, there is no cache here and always a BitLMOutput.

        Raises:
            ValueError: logits or labels of a diffusion head or of records; labels of other tokens; too long a text.
        """
        if noisy_bits is not None and log_sigma is not None:
            k = self.config.block_size
            ids, lead = self._blocks(input_ids, attention_mask)
            states, newest = self._states(ids, lead), self._newest(ids, lead)
            logits = self._evaluate(noisy_bits, log_sigma, states[:, :-k].unflatten(1, (-1, k)), newest)
            return BitLMOutput(logits=logits, last_hidden_state=states)
        wanted = labels is None if output_logits is None else output_logits
        chain = self.config.head_kind == "chain" and self.config.vocab_size
        if not chain and (wanted or labels is not None):
            which = (
                "records have no ids" if not self.config.vocab_size else "a diffusion head decides K tokens together"
            )
            raise ValueError(
                f"forward: {which}, so there are no logits of the next token; `score` gives the likelihood (or its "
                "bound), `output_logits=False` the states alone"
            )
        if not chain:
            return BitLMOutput(last_hidden_state=self._states(*self._blocks(input_ids, attention_mask)))
        ids, states, after = self._from_start("forward", input_ids, _mask(input_ids, attention_mask))
        loss = logits = None
        with torch.no_grad():
            if labels is not None:
                nats = self._nats_from_start(ids, states, after)
                loss = _loss(nats, input_ids, after, labels.to(ids.device), num_items_in_batch)
            if wanted:
                logits = NextTokens(self.head, self.model).log_p(ids, states, after[:, -logits_to_keep:])
        return BitLMOutput(loss=loss, logits=logits, last_hidden_state=states)

    def _from_start(self, what: str, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows moved to the left and filled up behind by 1 to K: ids [b, n K] and states [b, n K, D]; and how many
        tokens there are up to each column, [b, S], which is where the next one is."""
        most, length = self.config.max_position_embeddings, input_ids.shape[1]
        if length > most and int(mask.sum(1).max()) > most:
            raise ValueError(f"{what}: {length} tokens are more than the {most} the model was trained at")
        k = self.config.block_size
        order = (1 - mask).argsort(dim=1, stable=True)
        ids = input_ids.gather(1, order).masked_fill(mask.gather(1, order) == 0, self._eos())
        ids = F.pad(ids, (0, k - length % k), value=self._eos())
        position = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        return ids, self.model(fill_front(ids, k, 0)[:, :-k], position), mask.cumsum(1)

    def _nats_from_start(self, ids: Tensor, states: Tensor, after: Tensor) -> Tensor:
        """Of what `_from_start` gives, in the columns that the tokens had, [b, S]; some number for padding."""
        position = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        return Chain(self.head, self.model).read(ids, states, position).gather(1, (after - 1).clamp(min=0))

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
        blocks: str = "end",
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
            blocks: counted from the end of a row, as `generate` does, which fills it up in front ("end"); or, of a
                chain, from its first token ("start"): the nats of `forward`'s logits, of whole blocks the same.

        Raises:
            ValueError: longer than the model was trained for; an overlap or blocks of another model.
        """
        if blocks == "start" and self.config.head_kind == "chain" and self.config.vocab_size and not overlap:
            mask = _mask(input_ids, attention_mask)
            nats = self._nats_from_start(*self._from_start("score", input_ids, mask)) * mask
            return BitLMScore(nats=nats.sum(1), nats_per_token=nats)
        if blocks != "end":
            raise ValueError(f"score: blocks={blocks!r} has to be 'end', or of a chain's text without overlap 'start'")
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


def _mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """int64 [b, S], all ones where none is given."""
    return torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device).long()


def _loss(nats: Tensor, input_ids: Tensor, after: Tensor, labels: Tensor, items: Any) -> Tensor:
    """The mean over the labels, or their sum over `items`."""
    counted = labels != -100
    if bool((counted & (labels != input_ids)).any()):
        raise ValueError("forward: labels have to be input_ids, or -100; for other tokens gather from the logits")
    counted = counted & (after > 1)  # the first token of a row has nothing before it
    counted[:, :1] = False
    return (nats * counted).sum() / (counted.sum() if items is None else items)


def _where_given(nats: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Values of right-aligned, filled-up rows back to where the tokens stood; 0 for padding."""
    length, have = input_ids.shape[1], nats.shape[1]
    nats = F.pad(nats, (length - have, 0))  # cuts, where negative
    if attention_mask is None:
        return nats
    mask = attention_mask.to(nats.device).bool()
    order = mask.int().argsort(dim=1, stable=True)
    return torch.zeros_like(nats).scatter(1, order, nats).masked_fill(~mask, 0.0)
