"""A chain head that has learned from noisy blocks: a block along a front of noise."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone_bitlm import BitLMModel
from .bits_bitlm import bits_of, fill_front, spread
from .chain_bitlm import Answer, Chain, Draft, guide, gumbel
from .configuration_bitlm import BitLMConfig
from .embedding_bitlm import begun_keys, earlier, mean_of, name_of
from .head_bitlm import BitLMHead
from .noise_bitlm import RECONSTRUCTION, SAMPLING, VALIDATION, NoiseDistribution, gaussian, progress, stratified_levels
from .settings_bitlm import Settings


class Seen(NamedTuple):
    """What is seen of a block: groups that are decided as they are, others through noise."""

    decided: Tensor  # bool [b, K, G]
    log_sigma: Tensor  # float32 [b, K, G]
    z: Tensor  # float32 [b, K, B], noisy bits

    @classmethod
    def of(cls, config: BitLMConfig, noise: NoiseDistribution, come: Tensor, z: Tensor) -> Seen:
        """come: float32 [b, K, G], how far groups have come; 0 is not begun, and nothing is known of its bits then."""
        begun = spread(config, come > 0)
        return cls(come >= 1, noise.log_sigma(1.0 - come), torch.where(begun, z, torch.zeros_like(z)))


class Front(Chain):
    """A chain head that draws along a front."""

    def __init__(self, head: BitLMHead, backbone: BitLMModel) -> None:
        super().__init__(head, backbone)
        self.noise = NoiseDistribution(head.config)

    def _seen(self, draft: Draft, likely: Tensor, noise: Seen) -> Tensor:
        """`_known` of a block's groups [G, b, K, W], of which those have these probabilities; likely [b, K, G, U]."""
        head, own = self.head, mean_of(self.head.values, likely)
        name = likely.flatten(-2) @ head.previous
        name = name if head.pairs is None else name + head.pairs.expected(likely)
        newest = name_of(head.previous, head.pairs, draft.before[:, -1:]) * (draft.position[:, :1] > 0)[..., None]
        before = torch.cat((newest, name[:, :-1]), dim=1)
        if head.memory is None:
            return (before[:, :, None] + earlier(own)).movedim(2, 0)
        whole, certain = noise.decided.all(-1), [draft.position[:, 0]]  # tokens before each that n-grams may end with
        for i in range(1, whole.shape[1]):
            certain.append(torch.where(whole[:, i - 1], torch.minimum(draft.position[:, i], certain[-1] + 1), 0))
        count = torch.stack(certain, dim=1)
        keys = begun_keys(torch.cat((draft.before, draft.values), dim=1)[:, :-1])[..., -1]
        known = (before + head.memory(keys, count))[:, :, None] + earlier(own)
        if head.inner_memory is not None:
            inner = head.inner_memory(keys, count, begun_keys(draft.values)[..., :-1])
            inner = inner * (noise.decided.cumprod(-1)[..., :-1, None] > 0)
            known = known + F.pad(inner, (0, 0, 1, 0))
        return known.movedim(2, 0)

    def _through_noise(self, answers: list[Answer], draft: Draft, noise: Seen, guidance: float) -> Tensor:
        """Log-probabilities [b, K, G, U] of all groups of a block, without what their own bits say."""
        found = []
        for answer in answers:
            likely = self._likely(answer, draft.values, noise).to(answer.context.dtype)
            known = self._seen(draft, likely, noise)
            found.append(self._answer(answer, known, draft, likely, noise))
        log_p, *other = found
        if other:
            log_p = torch.where(log_p > float("-inf"), guide(log_p, other[0], guidance), log_p)
        return log_p.movedim(0, 2)

    def _fill(self, answers: list[Answer], draft: Draft, settings: Settings, sequence: Tensor, block: Tensor) -> None:
        """Draw the groups of a block along a front: in each of the evaluations those that are on their way are drawn
        given their noisy bits, and their noise falls as if that were right (ancestral sampling)."""
        config, (k, groups) = self.config, draft.values.shape[1:]
        steps = settings.steps or k * groups
        come = progress(torch.linspace(0, 1, steps + 1, device=draft.values.device), k * groups, settings.overlap)
        come = come.unflatten(1, (k, groups))[:, None].expand(-1, len(draft.values), -1, -1)
        z = torch.zeros(*draft.values.shape[:2], config.bits, device=draft.values.device)
        for i, (now, after) in enumerate(itertools.pairwise(come)):
            noise = Seen.of(config, self.noise, now, z)
            log_p = self._through_noise(answers, draft, noise, settings.guidance)
            sigma = spread(config, noise.log_sigma).exp()
            log_p = self.head.posterior.log_likely(noise.z, sigma, log_p.flatten(-2))
            fresh = gumbel(settings, config, sequence, block, steps + 1 + i)  # a first draw has the chain's own
            drawn_by = torch.where((now > 0)[..., None], fresh, draft.noise)
            for j in range(groups):
                own = slice(j, j + 1)
                drawn = self._draw(log_p[..., own, :], draft.values, drawn_by, own, settings.temperature)
                draft.values[..., own] = torch.where(noise.decided[..., own], draft.values[..., own], drawn)
            x, later = bits_of(config, draft.values), self.noise.log_sigma(1.0 - after)
            left = torch.where(spread(config, now > 0), (spread(config, later).exp() / sigma).square(), 0.0)
            eps = gaussian(settings.seed, SAMPLING, sequence, block[:, None], 1, k, config.bits, i + 1)[:, 0, 0]
            moved = x + left * (z - x) + spread(config, later).exp() * (1.0 - left).clamp(min=0).sqrt() * eps
            z = torch.where(spread(config, after > now), moved, z)
        self._take_in(answers[0], draft)

    def bound(
        self, ids: Tensor, states: Tensor, block: Tensor, sequence: Tensor, overlap: float, samples: int, seed: int
    ) -> Tensor:
        """The bound along a front, a block after the other, each token's share float32 [b, n, K].

        Args:
            ids: int64 [b, n K], or records; states: [b, n, K, D]; block: int64 [b, n], indices in their texts.
            samples: places of the front that are looked at in each block.
        """
        config, k, count = self.config, self.config.block_size, len(self.config.group_sizes)
        posterior, speed = self.head.posterior, 1.0
        if not math.isinf(overlap):
            speed = (k * count - 1 + overlap) / overlap
        position = (block[..., None] * k + torch.arange(k, device=ids.device)).flatten(1)
        self.read(ids[:, :0], states.flatten(1, 2)[:, :0], position[:, :0])
        bits, padded = self.bits(ids).float().unflatten(1, (-1, k)), self._values(fill_front(ids, self.reach, 0))
        t = stratified_levels(seed, VALIDATION, sequence, block, samples)
        eps = gaussian(seed, VALIDATION, sequence, block, samples, k, config.bits)
        last = gaussian(seed, RECONSTRUCTION, sequence, block, 1, k, config.bits)[:, :, 0]
        total = torch.zeros(*block.shape, k, device=ids.device)
        for n in range(block.shape[1]):
            here, x = position[:, n * k : (n + 1) * k], bits[:, n]
            values = padded[:, self.reach + n * k : self.reach + (n + 1) * k]
            answers = self._answers(states[:, n], 1.0, here)
            nothing = torch.empty(0, device=ids.device)  # is drawn
            draft = self._draft(padded[:, n * k : n * k + self.reach], values, nothing, here, states.dtype)
            for m in range(samples):
                come = progress(t[:, n, m], k * count, overlap).unflatten(1, (k, count))
                log_sigma = self.noise.log_sigma(1.0 - come)
                sigma = spread(config, log_sigma).exp()
                z = x + sigma * eps[:, n, m]
                log_p = self._through_noise(answers, draft, Seen.of(config, self.noise, come, z), 1.0)
                error = posterior.squared_error(posterior.log_likely(z, sigma, log_p.flatten(-2)), x)
                weight = ((come > 0) & (come < 1)) / (log_sigma.exp().square() * self.noise.density(log_sigma))
                total[:, n] += (error * spread(config, weight)).sum(-1) * (speed / samples)
            clean = self._take_in(answers[0], draft).flatten(-2)
            sigma = torch.full_like(x[..., :1], self.noise.sigma_min)
            read = posterior.log_likely(x + sigma * last[:, n], sigma, clean)
            total[:, n] += posterior.cross_entropy(read, x).sum(-1)
        return total + config.bits / (2.0 * self.noise.sigma_max**2)

    def _likely(self, answer: Answer, values: Tensor, noise: Seen) -> Tensor:
        """Probabilities [b, K, G, U] of what the block's groups are, as they are seen; values int64 [b, K, G]."""
        sigma = spread(self.config, noise.log_sigma).exp()
        likely = self.head.posterior.likely(noise.z, sigma, answer.prior)
        return torch.where(noise.decided[..., None], F.one_hot(values, likely.shape[-1]).to(likely.dtype), likely)

    def _answer(self, answer: Answer, known: Tensor, draft: Draft, likely: Tensor, noise: Seen) -> Tensor:
        """As `Answer.evaluate`, of all groups of the whole block, [G, b, K, U], without what their own bits say."""
        head, k = self.head, draft.values.shape[1]
        level = head.seen_levels(noise.log_sigma, noise.decided).movedim(2, 0)
        return head.groups(
            slice(None), known, answer.context, head.modulations(answer.context, slice(None), level), answer.prior,
            head.tie(answer.tie, draft.values, likely), torch.arange(k, device=known.device),
            draft.sight.at(slice(0, k), len(known)), answer.cache.keys, answer.cache.values,
        )  # fmt: skip
