"""A chain head at work: a block one group of bits after another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone_bitlm import BitLMModel
from .bits_bitlm import bits_of, fill_front, group_values, pack
from .configuration_bitlm import BitLMConfig
from .embedding_bitlm import begun_keys, look_up, name_of, reach_of
from .head_bitlm import BitLMHead, HeadCache, HeadSight
from .noise_bitlm import SAMPLING, uniforms
from .settings_bitlm import Settings


def guide(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598), of logits."""
    return unconditional + guidance * (conditional - unconditional)


def gumbel(settings: Settings, config: BitLMConfig, sequence: Tensor, block: Tensor, number: int = 0) -> Tensor:
    """Gumbel noise float32 [b, K, G, U] of a block: what decides its draws, whatever is evaluated when.

    number: of several of them.
    """
    shape = (config.block_size, len(config.group_sizes), 2 ** max(config.group_sizes))
    return gumbels(settings.seed, sequence, block, math.prod(shape), number).unflatten(1, shape)


def gumbels(seed: int, sequence: Tensor, block: Tensor, count: int, number: int) -> Tensor:
    """So many of them for each row, float32 [b, count]."""
    elements = torch.arange(-(-count // 4), device=block.device)
    drawn = uniforms(seed, SAMPLING, sequence, block[:, None], 1, elements, number)
    return -(-torch.stack(drawn, -1).flatten(1)[:, :count].log()).log()


def draw(log_p: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Values [...] from log-probabilities [..., U] by Gumbel noise: the same ones where those change a little."""
    return (log_p / temperature + noise if temperature else log_p).argmax(-1)


class Codes:
    """The codes of all tokens in order: which values a group can still have, and which token values mean."""

    def __init__(self, config: BitLMConfig, table: Tensor) -> None:
        self.sizes, self.full = config.group_sizes, len(table) == 2**config.bits
        self.codes, self.ids = self.join(group_values(config, table)).sort()  # int64 [V]
        self._first = self._impossible(table.new_zeros(0, dtype=torch.int64))  # of the first group, whatever the text

    def join(self, values: Tensor) -> Tensor:
        """Values of the first groups int64 [..., g] to the number that their bits are, int64 [...]."""
        code = torch.zeros_like(values[..., 0])
        for i, size in zip(range(values.shape[-1]), self.sizes, strict=False):
            code = (code << size) + values[..., i]
        return code

    def impossible(self, before: Tensor) -> Tensor:
        """bool [..., U]: values of group g that no token has behind those of the groups before, int64 [..., g].

        Behind values that no token has nothing is impossible: such a guess is never drawn from.
        """
        return self._impossible(before) if before.shape[-1] else self._first.expand(*before.shape[:-1], -1)

    def _impossible(self, before: Tensor) -> Tensor:
        group, most = before.shape[-1], 2 ** max(self.sizes)
        prefix = self.join(before) if group else torch.zeros_like(before.sum(-1))
        value = torch.arange(2 ** self.sizes[group] + 1, device=before.device)
        ends = ((prefix[..., None] << self.sizes[group]) + value) << sum(self.sizes[group + 1 :])
        place = torch.searchsorted(self.codes, ends)
        empty = place[..., 1:] == place[..., :-1]
        return F.pad(empty & ~empty.all(-1, keepdim=True), (0, most - empty.shape[-1]), value=True)

    def tokens(self, values: Tensor) -> Tensor:
        """Values of all groups int64 [..., G], of a token each, to ids int64 [...]."""
        return self.ids[torch.searchsorted(self.codes, self.join(values))]


class Written(NamedTuple):
    """Tokens from a beginning, and what conditions each."""

    values: Tensor  # int64 [b, s, G]
    position: Tensor  # int64 [b, s]
    context: Tensor  # [b, s, W]
    prior: Tensor | None  # [b, s, outputs]
    tie: Tensor | None  # [b, s, rank]


@dataclass
class Draft:
    """A block that is being drawn."""

    before: Tensor  # int64 [b, N, G], values of the tokens before it that a head has to know
    values: Tensor  # int64 [b, K, G], final or guessed
    position: Tensor  # int64 [b, K]
    noise: Tensor  # [b, K, G, U], that draws it
    sight: HeadSight


class Answer:
    """What a head is given to answer for a block: its condition, and what its attention needs of the tokens before."""

    def __init__(self, head: BitLMHead, context: Tensor, prior: Tensor | None, tie: Tensor | None, cache: HeadCache):
        """context [b, K, W], prior [b, K, outputs], tie [b, K, rank]."""
        self.context, self.prior, self.tie, self.cache = context, prior, tie, cache
        self.layers, self.last = head.modulations(context, slice(None))  # [G, b, K, ...]

    def evaluate(
        self, head: BitLMHead, stages: slice, known: Tensor, values: Tensor, here: slice, sight: HeadSight
    ) -> Tensor:
        """Log-probabilities [g, b, s, U] of groups of the tokens at the places `here`, which are taken in; values int64
        [b, s, G] are theirs, of which those before a group count."""
        tie = head.tie(None if self.tie is None else self.tie[:, here], values)
        return head.groups(
            stages, known, self.context[:, here], (self.layers[stages, :, here], self.last[stages, :, here]),
            None if self.prior is None else self.prior[:, here], None if tie is None else tie[stages],
            torch.arange(here.start, here.stop, device=known.device),
            sight.at(here, len(known)), self.cache.keys[:, stages], self.cache.values[:, stages],
        )  # fmt: skip


class Chain:
    """A chain head at work: draws blocks, and keeps what its attention needs of the tokens before."""

    def __init__(self, head: BitLMHead, backbone: BitLMModel) -> None:
        self.head, self.config, self.bits = head, head.config, backbone.bits
        self.reach = reach_of(head.config)
        self.codes = Codes(head.config, backbone.code_table) if head.config.vocab_size else None
        self.cache: HeadCache | None = None

    def _values(self, tokens: Tensor) -> Tensor:
        """The values of the tokens' groups, int64 [..., G]."""
        return group_values(self.config, self.bits(tokens))

    def _known(self, values: Tensor, behind: Tensor, position: Tensor) -> Tensor:
        """What groups see of others, [G, b, s, W].

        Args:
            values: int64 [b, s, G], of the tokens.
            behind: int64 [b, N - 1 + s, G], of the tokens before them: the last s are those before each.
            position: int64 [b, s], each token's own, which is how many are before it.
        """
        head, own = self.head, look_up(self.head.values, values)
        previous = behind[:, behind.shape[1] - values.shape[1] :]
        before = name_of(head.previous, head.pairs, previous) * (position > 0)[..., None]
        if head.memory is None:
            return (before[:, :, None] + own.cumsum(-2) - own).movedim(2, 0)
        keys = begun_keys(behind)[..., -1]
        before = before + head.memory(keys, position)
        known = before[:, :, None] + own.cumsum(-2) - own
        if head.inner_memory is not None:
            inner = head.inner_memory(keys, position, begun_keys(values)[..., :-1])
            known = known + F.pad(inner, (0, 0, 1, 0))
        return known.movedim(2, 0)

    def _of_block(self, states: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Condition, prior and tie of the states' tokens, [b, s, ...]; None for what the head has not."""
        blocks = states if states.dim() == 4 else states.unflatten(1, (-1, self.config.block_size))
        context = self.head.of_block("condition", blocks).flatten(1, 2)
        prior = self.head.of_block("prior", blocks).flatten(1, 2) if self.config.head_prior else None
        tie = self.head.of_block("tie", blocks).flatten(1, 2) if self.config.prior_rank else None
        return context, prior, tie

    def read(self, ids: Tensor, states: Tensor, position: Tensor) -> Tensor:
        """Take in tokens int64 [b, s] from a beginning, with the states and positions [b, s] that condition them.

        Returns:
            their nats, float32 [b, s].
        """
        text = self._written(ids, states, position)
        length, most = ids.shape[1], self.config.head_window - 1 + self.config.block_size
        self.cache = HeadCache(self.config, text.values.shape[-1], len(ids), most, text.context)
        kept = min(most, length)  # the newest, as many as it has slots
        new, old = slice(length - kept, None), slice(most - kept, None)
        self.cache.position[:, old] = position[:, new]
        nats = torch.zeros(ids.shape[:2], device=ids.device)
        for i, (log_p, own) in enumerate(self._each_group(text)):
            nats = nats - log_p.gather(-1, text.values[..., i, None]).squeeze(-1)
            self.cache.keys[:, i : i + 1, ..., old, :] = own.keys[..., new, :]
            self.cache.values[:, i : i + 1, ..., old, :] = own.values[..., new, :]
        return nats

    def _written(self, ids: Tensor, states: Tensor, position: Tensor) -> Written:
        return Written(self._values(ids), position, *self._of_block(states))

    def _each_group(self, text: Written) -> Iterator[tuple[Tensor, HeadCache]]:
        """One group after another, so that the memory is that of one: its log-probabilities [b, s, U] behind what is
        before it, and its keys and values of all tokens."""
        values, position, context, prior, tied = text
        rows, length = position.shape
        slots = torch.arange(length, device=position.device)
        known = self._known(values, F.pad(values, (0, 0, self.reach, 0))[:, :-1], position)
        tie, place = self.head.tie(tied, values), slots % self.config.block_size
        sight = HeadSight.of(self.config, position, position, slots, context.dtype)
        for i in range(len(known)):
            stage, own = slice(i, i + 1), HeadCache(self.config, 1, rows, length, context)
            told = None if tie is None else tie[stage]
            given = (known[stage], context, self.head.modulations(context, stage), prior, told, place, sight)
            yield self.head.groups(stage, *given, own.keys, own.values)[0], own

    def advance(
        self, tokens: Tensor, states: Tensor, position: Tensor, settings: Settings, sequence: Tensor, block: Tensor
    ) -> Tensor:
        """Draw the next block, ids int64 [b, K]: each group behind those before it, of the values that a token has.

        Every group has its own uniform number, so its value is a function of the values before it, and a guess of all
        of them can be checked at once: one evaluation draws every group as if the guesses before it were right, and
        those are final before which they all were, and the first one behind. What was drawn is the next guess. The
        result is that of drawing one group after another, in fewer evaluations.

        The unconditional answer that guidance needs has a past of its own from the beginning of the block on; what is
        before has its conditions, as in training, which drops those of single blocks.

        Args:
            tokens: int64 [b, n K], all so far (or records).
            states, position: from `Context.advance`.
            sequence, block: int64 [b], keys of the noise.
        """
        k = self.config.block_size
        if states.shape[1] > k or self.cache is None:
            self.read(tokens[:, tokens.shape[1] - (states.shape[1] - k) :], states[:, :-k], position[:, :-k])
        before = self._values(fill_front(tokens, self.reach, 0)[:, -self.reach :])
        noise = gumbel(settings, self.config, sequence, block)
        answers = self._answers(states[:, -k:], settings.guidance, position[:, -k:])
        guess = self._guess(answers[0].prior if settings.ahead else None, noise, settings.temperature)
        draft = self._draft(before, guess, noise, position[:, -k:], states.dtype)
        self._fill(answers, draft, settings, sequence, block)
        return self._tokens(draft.values)

    def _fill(self, answers: list[Answer], draft: Draft, settings: Settings, sequence: Tensor, block: Tensor) -> None:
        """Draw the values of the draft."""
        (b, k, groups), device = draft.values.shape, draft.values.device
        ahead, first = settings.ahead, 0
        done = torch.zeros(b, 1, dtype=torch.int64, device=device)  # tokens and groups that are final
        while first < k:
            if not ahead:
                for i in range(groups):
                    drawn = self._evaluate(answers, draft, slice(first, first + 1), slice(i, i + 1), settings)
                    draft.values[:, first : first + 1, i : i + 1] = drawn
                first += 1
            else:
                here = slice(first, min(k, first + ahead))
                drawn = self._evaluate(answers, draft, here, slice(0, groups), settings).flatten(1)
                guess = draft.values[:, here].flatten(1)
                number = torch.arange(here.start * groups, here.stop * groups, device=device)
                drawn = torch.where(number < done, guess, drawn)
                right = (drawn == guess).int().cumprod(1).sum(1, keepdim=True)
                done = (first * groups + right + 1).clamp(max=here.stop * groups)
                draft.values[:, here] = drawn.unflatten(1, (-1, groups))
                first = int(done.min()) // groups

    def _evaluate(self, answers: list[Answer], draft: Draft, here: slice, stages: slice, settings: Settings) -> Tensor:
        """Draw the groups `stages` of the tokens at the places `here`, int64 [b, s, g], as if the draft were right."""
        values, whole = draft.values[:, here], torch.cat((draft.before, draft.values), dim=1)
        position, behind = draft.position[:, here], whole[:, here.start : here.stop + self.reach - 1]
        known = self._known(values, behind, position)[stages]
        log_p, *other = (answer.evaluate(self.head, stages, known, values, here, draft.sight) for answer in answers)
        if other:  # the same of log-probabilities as of logits, but for a constant
            log_p = torch.where(log_p > float("-inf"), guide(log_p, other[0], settings.guidance), log_p)
        return self._draw(log_p.movedim(0, 2), values, draft.noise[:, here], stages, settings.temperature)

    def _take_in(self, answer: Answer, draft: Draft) -> Tensor:
        """The whole block as it is now, for those after it; log-probabilities of all groups, [b, K, G, U]."""
        behind = torch.cat((draft.before, draft.values), dim=1)[:, :-1]
        known, here = self._known(draft.values, behind, draft.position), slice(0, draft.values.shape[1])
        return answer.evaluate(self.head, slice(None), known, draft.values, here, draft.sight).movedim(0, 2)

    def _draft(self, before: Tensor, values: Tensor, noise: Tensor, position: Tensor, dtype: torch.dtype) -> Draft:
        """A block at these positions int64 [b, K], for which the cache has room (`_answers`)."""
        assert self.cache is not None
        keys, k = self.cache.position, position.shape[1]
        slots = torch.arange(keys.shape[1] - k, keys.shape[1], device=keys.device)
        return Draft(before, values, position, noise, HeadSight.of(self.config, position, keys, slots, dtype))

    def _answers(self, states: Tensor, guidance: float, position: Tensor) -> list[Answer]:
        """What answers for the next block, with these states [b, K, D] and positions [b, K]; with guidance also what
        does without them."""
        context, prior, tie = self._of_block(states)
        assert self.cache is not None
        self.cache.begin(position)
        answers = [Answer(self.head, context, prior, tie, self.cache)]
        if guidance != 1.0:
            answers.append(Answer(self.head, torch.zeros_like(context), None, None, self.cache.copy()))
        return answers

    def _guess(self, prior: Tensor | None, noise: Tensor, temperature: float) -> Tensor:
        """A first guess of a block's groups int64 [b, K, G]: what the prior alone draws."""
        guess = torch.zeros(noise.shape[:-1], dtype=torch.int64, device=noise.device)
        if prior is not None:
            log_p = self.head.posterior.log_softmax(prior.float().unflatten(-1, noise.shape[2:]))
            for i in range(noise.shape[2]):
                own = slice(i, i + 1)
                guess[..., own] = self._draw(log_p[..., own, :], guess, noise, own, temperature)
        return guess

    def _draw(self, log_p: Tensor, values: Tensor, noise: Tensor, stages: slice, temperature: float) -> Tensor:
        """Groups int64 [b, s, g] from their log_p [b, s, g, U], of what can follow `values` [b, s, G] before each."""
        if self.codes is not None and not self.codes.full:
            which = range(stages.start, stages.stop)
            impossible = torch.stack([self.codes.impossible(values[..., :i]) for i in which], dim=-2)
            log_p = log_p.masked_fill(impossible, float("-inf"))
        return draw(log_p, noise[:, :, stages], temperature)

    def _tokens(self, values: Tensor) -> Tensor:
        """Values int64 [..., G] to ids or records."""
        return pack(bits_of(self.config, values)) if self.codes is None else self.codes.tokens(values)
