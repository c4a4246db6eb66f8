"""A chain that draws token after token out of all V: what truncates or reweighs the distribution of a whole token."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .backbone_bitlm import BitLMModel
from .chain_bitlm import gumbels
from .head_bitlm import BitLMHead
from .logits_bitlm import NextTokens
from .settings_bitlm import Settings


class Tokenwise(NextTokens):
    """Draws blocks from `log_p`, through transformers' own processors, in their order."""

    def __init__(self, head: BitLMHead, backbone: BitLMModel, settings: Settings, first: Tensor, width: int) -> None:
        """first: int64 [b], where each row's text begins in the tokens; width: tokens up to the end of the prompts."""
        super().__init__(head, backbone)
        self.first, self.width = first.tolist(), width
        self.states: Tensor | None = None
        self.processors = LogitsProcessorList()
        if settings.repetition_penalty != 1.0:
            self.processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        self.warpers = LogitsProcessorList()
        if settings.temperature not in (0.0, 1.0):
            self.warpers.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            self.warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(settings.top_p))

    def advance(
        self, tokens: Tensor, states: Tensor, position: Tensor, settings: Settings, sequence: Tensor, block: Tensor
    ) -> Tensor:
        """The next block int64 [b, K], as `Chain.advance`; all tokens of the context are read for each new one."""
        k, index = self.config.block_size, torch.arange(states.shape[1], device=states.device)
        if self.states is None or states.shape[1] > k:  # the context begins, or begins anew
            shift = -position[:, :1].clamp(max=0)  # rows from their own beginnings on
            order = (index + shift).clamp(max=len(index) - 1)
            self.states = states.gather(1, order[..., None].expand_as(states))
            self.at = position[:, -k]
        else:  # each row's new block behind what it has; what was there is filling
            self.at = self.at + k
            wide = torch.cat((self.states, torch.zeros_like(states)), dim=1)
            here = (self.at[:, None] + index)[..., None].expand_as(states)
            self.states = wide.scatter(1, here, states)
        length, text = self.states.shape[1], tokens
        for i in range(k):
            at = self.at + i
            back = text.shape[1] - at[:, None] + torch.arange(length, device=text.device)
            ids = text.gather(1, back.clamp(max=text.shape[1] - 1))
            scores = self.log_p(ids, self.states, at[:, None])[:, 0]
            text = torch.cat((text, self._choose(text, scores, settings, sequence, block, i)[:, None]), dim=1)
        return text[:, -k:]

    def _choose(
        self, text: Tensor, scores: Tensor, settings: Settings, sequence: Tensor, block: Tensor, place: int
    ) -> Tensor:
        if self.processors:  # of each row's own text, without what fills it up in front
            own = enumerate(self.first)
            scores = torch.cat([self.processors(text[i : i + 1, a:], scores[i : i + 1]) for i, a in own])  # type: ignore[arg-type]
        if settings.eos and text.shape[1] - self.width < settings.min_new_tokens:
            scores[:, sorted(settings.eos)] = float("-inf")
        if settings.temperature == 0.0:
            return scores.argmax(-1)
        scores = torch.as_tensor(self.warpers(text, scores))  # type: ignore[arg-type]
        return (scores + gumbels(settings.seed, sequence, block, scores.shape[1], place)).argmax(-1)
