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

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

VALIDATION, SAMPLING, RECONSTRUCTION = 1, 2, 3  # streams of the noise, as in training
LEVEL = 0xFFFF  # element counter of a block's noise level; those of its bits count up from 0
HEAD_EPS = 1e-6  # of the head's norms
FEATURES = 128  # sinusoids of the noise level
CLIP = 30.0  # of the matched filter's log-odds


HEAD_KINDS = ("diffusion", "chain")
NAMES = ("sum", "pairs")
SIGMA_KINDS = ("lognormal", "logistic", "entropy_rate")


class BitLMConfig(PretrainedConfig):
    """Sizes under transformers' usual names; `head_*` are the denoising head's, `sigma_*` the noise distribution's."""

    model_type = "bitlm"

    def __init__(
        self,
        vocab_size: int = 256,
        bits: int = 8,
        block_size: int = 4,
        block_causal: bool = False,
        hidden_size: int = 64,
        intermediate_size: int = 160,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        head_dim: int | None = None,
        max_position_embeddings: int = 128,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        qk_norm: bool = True,
        head_hidden_size: int = 32,
        head_intermediate_size: int = 64,
        head_num_layers: int = 1,
        head_num_attention_heads: int = 4,
        head_kind: str = "diffusion",
        head_prior: bool = True,
        head_window: int = 8,
        group_sizes: Sequence[int] | None = None,
        names: str = "sum",
        prior_rank: int = 0,
        token_before: bool = False,
        soft_prior: bool = False,
        memory_rows: int = 0,
        memory_orders: Sequence[int] = (2, 3),
        memory_hashes: int = 1,
        matched_filter: bool = True,
        sigma_min: float = 0.1,
        sigma_max: float = 160.0,
        sigma_log_mean: float = -1.2,
        sigma_log_std: float = 1.2,
        sigma_kind: str = "lognormal",
        sigma_masses: Sequence[float] | None = None,
        levels_apart: bool = False,
        noisy_blocks: bool = False,
        condition_drop: float = 0.0,
        self_condition: bool = False,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size  # 0: tokens are records of `bits` bits, without ids
        self.bits = bits
        self.block_size = block_size
        self.block_causal = block_causal  # a token sees its whole block of the backbone's input, not only what is left
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings  # the length it was trained at
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.qk_norm = qk_norm
        self.head_hidden_size = head_hidden_size
        self.head_intermediate_size = head_intermediate_size
        self.head_num_layers = head_num_layers
        self.head_num_attention_heads = head_num_attention_heads
        self.head_kind = head_kind  # diffusion or chain
        self.head_prior = head_prior
        self.head_window = head_window  # tokens that a chain head's attention reaches back to
        self.group_sizes = list(group_sizes or [1] * bits)  # bits that are decided together
        self.names = names  # of tokens: the sum of their groups' embeddings, or also products over pairs of groups
        self.prior_rank = prior_rank  # above 0 the prior of a chain's group is told the groups before it
        self.token_before = token_before  # enters a diffusion head beside each token: soft, or the newest decided one
        self.soft_prior = soft_prior  # what noisy bits allow is weighed by the prior
        self.memory_rows = memory_rows  # of each table of hashed n-grams; 0: there are none
        self.memory_orders = list(memory_orders)  # lengths of the n-grams in tokens
        self.memory_hashes = memory_hashes  # tables for each
        self.matched_filter = matched_filter
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.sigma_log_mean = sigma_log_mean
        self.sigma_log_std = sigma_log_std
        self.sigma_kind = sigma_kind  # lognormal, logistic or entropy_rate
        self.sigma_masses = None if sigma_masses is None else list(sigma_masses)  # of equal bins of ln sigma, measured
        self.levels_apart = levels_apart  # the head is told the noise level of every group, and not of the block
        self.noisy_blocks = noisy_blocks  # a chain that has also learned from blocks seen through noise: overlap works
        self.condition_drop = condition_drop  # how often training hid the states from the head: above 0 guidance works
        self.self_condition = self_condition  # the head takes its own estimate of the clean bits as one more input
        self.initializer_range = initializer_range
        for name, allowed in (("head_kind", HEAD_KINDS), ("sigma_kind", SIGMA_KINDS), ("names", NAMES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} has to be one of {', '.join(allowed)}")
        super().__init__(**kwargs)


# ------------------------------------------------------------------------------------------------- groups of bits
def _slices(config: BitLMConfig) -> list[slice]:
    ends = list(itertools.accumulate(config.group_sizes))
    return [slice(end - size, end) for end, size in zip(ends, config.group_sizes, strict=True)]


def _rows(config: BitLMConfig) -> int:
    """Rows of a table with one for each value of each group; all groups have as many as the largest one needs."""
    return len(config.group_sizes) * 2 ** max(config.group_sizes)


def group_values(config: BitLMConfig, bits: Tensor) -> Tensor:
    """Bits [..., B] to the values of the groups, int64 [..., G]; a group's first bit counts most."""
    values = []
    for part, size in zip(_slices(config), config.group_sizes, strict=True):
        weight = 2 ** torch.arange(size - 1, -1, -1, device=bits.device)
        values.append(((bits[..., part] > 0) * weight).sum(-1))
    return torch.stack(values, dim=-1)


def _codes(size: int, like: Tensor) -> Tensor:
    """[2^size, size]: the bits of every value of a group."""
    value = torch.arange(2**size, device=like.device)
    digits = torch.arange(size - 1, -1, -1, device=like.device)
    return ((value[:, None] >> digits) & 1).to(like.dtype) * 2 - 1


def _bits_of(config: BitLMConfig, values: Tensor) -> Tensor:
    """Values of the groups int64 [..., G] to bits float32 [..., B]."""
    like = torch.zeros((), device=values.device)
    sizes = enumerate(config.group_sizes)
    return torch.cat([_codes(size, like)[values[..., i]] for i, size in sizes], dim=-1)


def pack(bits: Tensor) -> Tensor:
    """Bits [..., B] (above 0 or not) to records uint8 [..., ceil(B / 8)]; what is left of the last byte is 0."""
    ones = F.pad((bits > 0).to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (ones << torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def unpack(records: Tensor, bits: int) -> Tensor:
    """Records uint8 [..., ceil(B / 8)] to bits int8 [..., B] of -1 and +1."""
    ones = (records[..., None] >> torch.arange(7, -1, -1, dtype=torch.uint8, device=records.device)) & 1
    return ones.flatten(-2)[..., :bits].to(torch.int8) * 2 - 1


def _fill_front(tokens: Tensor, count: int, value: int) -> Tensor:
    """Tokens [b, S] or records [b, S, bytes] with so many more in front (or without so many, below 0)."""
    return F.pad(tokens, (*[0, 0] * (tokens.dim() - 2), count, 0), value=value)


def _look_up(table: Tensor, values: Tensor) -> Tensor:
    """Values int64 [..., G] to embeddings [..., G, width]."""
    groups = values.shape[-1]
    return F.embedding(values + torch.arange(groups, device=values.device) * (len(table) // groups), table)


def _mean(table: Tensor, probability: Tensor) -> Tensor:
    """Probabilities of values [..., G, U] to the means of their embeddings [..., G, width]."""
    return torch.einsum("...gu,guw->...gw", probability, table.unflatten(0, (probability.shape[-2], -1)))


class Pairs(nn.Module):
    """Products over all pairs of groups of a second set of embeddings, through a linear map."""

    def __init__(self, config: BitLMConfig, size: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.zeros(_rows(config), 2 * size))
        self.mix = nn.Linear(2 * size, size, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        """Values of the groups int64 [..., G] to [..., width]."""
        return self._mixed(_look_up(self.factors, values))

    def expected(self, probability: Tensor) -> Tensor:
        """Probabilities of values [..., G, U] to [..., width], as of independent groups."""
        return self._mixed(_mean(self.factors, probability))

    def _mixed(self, x: Tensor) -> Tensor:
        count = x.shape[-2]
        return self.mix((x * _earlier(x)).sum(-2) * math.sqrt(2.0 / (count * (count - 1))))


def _earlier(x: Tensor) -> Tensor:
    """[..., G, width] to the sum over the groups before each, of the same shape."""
    return x.cumsum(-2) - x


def _pairs(config: BitLMConfig, size: int) -> Pairs | None:
    return Pairs(config, size) if config.names == "pairs" else None


def _name_of(table: Tensor, pairs: Pairs | None, values: Tensor) -> Tensor:
    """What tokens are called where they enter: values int64 [..., G] to [..., width]."""
    x = _look_up(table, values).sum(-2)
    return x if pairs is None else x + pairs(values)


# ------------------------------------------------------------------------------------------------- memory
_GOLDEN, _MIX = 0x9E3779B97F4A7C15 - (1 << 64), (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_GROUP, _TOKEN, _SALT, _BEGUN = 0, 1, 2, 63  # what has factors of its own; what comes behind the tokens of an n-gram


def _mixed(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), int64."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX[0]
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX[1]
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _factors(kind: int, count: int, device: torch.device) -> Tensor:
    return _mixed((torch.arange(1, count + 1, device=device) + (kind << 32)) * _GOLDEN) | 1


def _begun_keys(values: Tensor) -> Tensor:
    """Values of groups int64 [..., G] to keys of the first group, the first two, and so on up to all, [..., G]."""
    return _mixed(((values + 1) * _factors(_GROUP, values.shape[-1], values.device)).cumsum(-1))


class Memory(nn.Module):
    """Embeddings of hashed n-grams of tokens, a table for each order and hash, one under the other."""

    def __init__(self, config: BitLMConfig, size: int) -> None:
        super().__init__()
        self.rows, self.orders, self.hashes = config.memory_rows, config.memory_orders, config.memory_hashes
        self.table = nn.Parameter(torch.zeros(self.rows * len(self.orders) * self.hashes, size))

    def forward(self, keys: Tensor, known: Tensor, begun: Tensor | None = None) -> Tensor:
        """
        Args:
            keys: int64 [b, R + s], of the s tokens with which n-grams end, and of R more before them.
            known: int64 [b, s], how many tokens of the text there are up to each.
            begun: int64 [b, s, N], keys of what comes behind each and is its n-grams' last part.

        Returns:
            [b, s, W], or [b, s, N, W]; of n-grams for which the text is too short yet nothing.
        """
        size, out = known.shape[1], torch.zeros((), device=keys.device, dtype=self.table.dtype)
        token, salt = (_factors(kind, 64, keys.device) for kind in (_TOKEN, _SALT))
        for i, order in enumerate(self.orders):
            count = order if begun is None else order - 1
            key = torch.zeros_like(known)
            for j in range(count):
                key = key + keys[:, keys.shape[1] - size - j : keys.shape[1] - j] * token[j]
            enough = (known >= count)[..., None]
            if begun is not None:
                key, enough = key[..., None] + begun * token[_BEGUN], enough[..., None]
            for k in range(self.hashes):
                number = i * self.hashes + k
                row = (_mixed(key + salt[number]) & (2**63 - 1)) % self.rows + number * self.rows
                out = out + F.embedding(row, self.table) * enough
        return out


def _memory(config: BitLMConfig, size: int) -> Memory | None:
    return Memory(config, size) if config.memory_rows else None


def _reach(config: BitLMConfig) -> int:
    """Tokens before a token that the head has to know: the one before, and those of its n-grams."""
    return max([1, *config.memory_orders]) if config.memory_rows else 1


# ------------------------------------------------------------------------------------------------- noise
def philox(key: tuple[int, int], counter: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011): four int64 tensors of 32-bit words for four broadcastable counters."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    (k0, k1), mask = key, 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & mask) ^ c1 ^ k0, p1 & mask, ((p0 >> 32) & mask) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def _uniforms(
    seed: int, stream: int, sequence: Tensor, block: Tensor, levels: int, elements: Tensor, first_level: int = 0
) -> list[Tensor]:
    """sequence int64 [b], block int64 [b, n], elements int64 [E] to four float32 [b, n, levels, E] in (0, 1)."""
    mask = 0xFFFFFFFF
    level = torch.arange(first_level, first_level + levels, device=block.device)[:, None] * 65536
    row = sequence[:, None, None, None]
    counter = (level + elements, block.clamp(min=0)[..., None, None], row & mask, (row >> 32) & mask)
    words = philox((seed & mask, ((seed >> 32) ^ (stream * 0x9E3779B9)) & mask), counter)
    return [((word >> 9).float() + 0.5) * (1.0 / (1 << 23)) for word in words]


def stratified_levels(seed: int, stream: int, sequence: Tensor, block: Tensor, levels: int) -> Tensor:
    """float32 [b, n, M] in (0, 1), the m-th of a block in the m-th of M equal strata."""
    u = _uniforms(seed, stream, sequence, block, levels, torch.tensor([LEVEL], device=block.device))[0][..., 0]
    return (torch.arange(levels, device=block.device) + u.clamp(max=1.0 - 2.0**-12)) / levels


def gaussian(
    seed: int,
    stream: int,
    sequence: Tensor,
    block: Tensor,
    levels: int,
    block_size: int,
    bits: int,
    first_level: int = 0,
) -> Tensor:
    """Standard normals float32 [b, n, M, K, B] (Box-Muller) for sequences [b] and blocks [b, n]."""
    count = block_size * bits
    elements = torch.arange(-(-count // 4), device=block.device)
    u0, u1, u2, u3 = _uniforms(seed, stream, sequence, block, levels, elements, first_level)
    r0, r1 = torch.sqrt(-2.0 * torch.log(u0)), torch.sqrt(-2.0 * torch.log(u2))
    a0, a1 = u1 * (2 * math.pi), u3 * (2 * math.pi)
    eps = torch.stack((r0 * torch.cos(a0), r0 * torch.sin(a0), r1 * torch.cos(a1), r1 * torch.sin(a1)), dim=-1)
    return eps.flatten(3)[..., :count].unflatten(3, (block_size, bits))


class NoiseDistribution:
    """ln(sigma / 2) ~ Normal(mean, std) or Logistic(mean, std), truncated to [sigma_min, sigma_max]; or bins of ln
    sigma with measured probabilities (entropy_rate)."""

    def __init__(self, config: BitLMConfig) -> None:
        self.kind, self.masses = (
            config.sigma_kind,
            config.sigma_masses or [1.0],
        )  # no tensor: made on the meta device too
        self.sigma_min, self.sigma_max = config.sigma_min, config.sigma_max
        self.mean, self.std = config.sigma_log_mean, config.sigma_log_std

    def _cdf(self, sigma: float) -> float:
        if self.kind == "logistic":
            return 0.5 * (1.0 + math.tanh(0.5 * (math.log(sigma / 2) - self.mean) / self.std))
        return 0.5 * (1.0 + math.erf((math.log(sigma / 2) - self.mean) / (self.std * math.sqrt(2.0))))

    def log_sigma(self, u: Tensor) -> Tensor:
        """u in (0, 1) to ln sigma."""
        ends = math.log(self.sigma_min), math.log(self.sigma_max)
        if self.kind == "entropy_rate":
            masses, u = torch.tensor(self.masses, dtype=torch.float64, device=u.device), u.double()
            cdf = F.pad(masses.cumsum(0), (1, 0))
            index = torch.searchsorted(cdf[1:-1], u, right=True)
            place = (index + (u - cdf[index]) / masses[index]) / len(masses)
            return (ends[0] + (ends[1] - ends[0]) * place).float().clamp(*ends)
        low, high = self._cdf(self.sigma_min), self._cdf(self.sigma_max)
        standard = (torch.logit if self.kind == "logistic" else torch.special.ndtri)(low + u * (high - low))
        return (self.mean + self.std * standard + math.log(2.0)).clamp(*ends)

    def density(self, log_sigma: Tensor) -> Tensor:
        """Density over ln sigma."""
        if self.kind == "entropy_rate":
            width = math.log(self.sigma_max / self.sigma_min) / len(self.masses)
            index = ((log_sigma.double() - math.log(self.sigma_min)) / width).long().clamp(0, len(self.masses) - 1)
            masses = torch.tensor(self.masses, dtype=torch.float64, device=log_sigma.device)
            return (masses[index] / width).float()
        mass = self._cdf(self.sigma_max) - self._cdf(self.sigma_min)
        standard = (log_sigma - math.log(2.0) - self.mean) / self.std
        if self.kind == "logistic":
            return torch.sigmoid(standard) * torch.sigmoid(-standard) / (self.std * mass)
        return torch.exp(-0.5 * standard * standard) / (math.sqrt(2 * math.pi) * self.std * mass)

    def grid(self, steps: int, device: torch.device) -> Tensor:
        """float32 [steps], ln sigma falling: quantiles of the training distribution."""
        return self.log_sigma(torch.linspace(1.0, 0.0, steps, device=device).clamp(1e-6, 1 - 1e-6))


class Posterior:
    """What the head's outputs say of the bits: logits are log-odds [..., B] of single bits, or with groups
    log-probabilities of their values, [..., G, U] (minus infinity for those a smaller group lacks)."""

    def __init__(self, config: BitLMConfig) -> None:
        self.config, self.groups = config, config.head_kind == "chain" or max(config.group_sizes) > 1

    def logits(self, outputs: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
        """outputs of the head [..., outputs], z = x + sigma eps float32 [..., B]."""
        odds = (2.0 * z / (sigma * sigma)).clamp(-CLIP, CLIP)  # exact for a bit that has nothing to do with the others
        if not self.groups:
            return outputs.float() + odds if self.config.matched_filter else outputs.float()
        outputs = outputs.float().unflatten(-1, (len(self.config.group_sizes), -1))
        if self.config.matched_filter:
            outputs = outputs + self.evidence(odds)
        return self.log_softmax(outputs)

    def likely(self, z: Tensor, sigma: Tensor, prior: Tensor | None = None) -> Tensor:
        """Probabilities of values given their own noisy bits and the prior's logits [..., outputs], [..., G, U]."""
        return self.log_likely(z, sigma, prior).exp()

    def log_likely(self, z: Tensor, sigma: Tensor, prior: Tensor | None = None) -> Tensor:
        """Their logarithms."""
        evidence = self.evidence((2.0 * z / (sigma * sigma)).clamp(-CLIP, CLIP))
        if prior is not None:
            evidence = evidence + prior.float().unflatten(-1, evidence.shape[-2:])
        return self.log_softmax(evidence)

    def evidence(self, odds: Tensor) -> Tensor:
        """Log-odds of bits [..., B] to unnormalised log-probabilities of values [..., G, U]."""
        parts = []
        for part, size in zip(_slices(self.config), self.config.group_sizes, strict=True):
            value = 0.5 * odds[..., part] @ _codes(size, odds).t()
            parts.append(F.pad(value, (0, 2 ** max(self.config.group_sizes) - 2**size)))
        return torch.stack(parts, dim=-2)

    def log_softmax(self, logits: Tensor, groups: slice = slice(None)) -> Tensor:
        """Over the values [..., g, U] of these groups, of which a smaller one lacks some."""
        if min(self.config.group_sizes) == max(self.config.group_sizes):
            return logits.log_softmax(-1)
        sizes = torch.tensor(self.config.group_sizes[groups], device=logits.device)[:, None]
        missing = torch.arange(logits.shape[-1], device=logits.device) >= 2**sizes
        return logits.masked_fill(missing, float("-inf")).log_softmax(-1)

    def _probability(self, logits: Tensor, bit: int) -> Tensor:
        parts = []
        for i, size in enumerate(self.config.group_sizes):
            parts.append(logits[..., i, : 2**size].exp() @ (_codes(size, logits) == bit).to(logits.dtype))
        return torch.cat(parts, dim=-1)

    def mean(self, logits: Tensor) -> Tensor:
        """E[x | z], [..., B]."""
        if not self.groups:
            return torch.tanh(0.5 * logits)
        return self._probability(logits, 1) - self._probability(logits, -1)

    def squared_error(self, logits: Tensor, x: Tensor) -> Tensor:
        """(x - E[x | z])^2 of every bit, [..., B]."""
        if not self.groups:
            return 4.0 * torch.sigmoid(-x * logits).square()
        return 4.0 * torch.where(x > 0, self._probability(logits, -1), self._probability(logits, 1)).square()

    def cross_entropy(self, logits: Tensor, x: Tensor) -> Tensor:
        """-ln p of the bits [..., B], or of the groups [..., G]."""
        if not self.groups:
            return F.softplus(-x * logits)
        values = group_values(self.config, x)[..., None]
        return -logits.gather(-1, values.expand(*logits.shape[:-1], 1)).squeeze(-1)

    def likeliest(self, logits: Tensor) -> Tensor:
        """The likeliest value of every group, or bit, as bits [..., B]."""
        return _bits_of(self.config, logits.argmax(-1)) if self.groups else logits.sign()

    def nearest_token(self, logits: Tensor, table: Tensor) -> Tensor:
        """The likeliest tokens, int64 [...]; of single bits megatron-bit may put a faster form here."""
        return self.token_scores(logits, table).argmax(-1)

    def token_scores(self, logits: Tensor, table: Tensor) -> Tensor:
        """Log-probability of every token but for a constant, [..., V], from the code table [V, B]."""
        if not self.groups:
            return logits @ table.t().float()
        values = group_values(self.config, table)
        return torch.stack([logits[..., i, v] for i, v in enumerate(values.t())]).sum(0)


# ------------------------------------------------------------------------------------------------- samplers
Mean = Callable[[Tensor, Tensor], Tensor]  # (z, ln sigma) to E[x | z]
Noise = Callable[[int], Tensor]  # the i-th standard normal of a block


def _euler(z: Tensor, x_hat: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """A step of the probability-flow ODE, dz / dsigma = (z - x_hat) / sigma."""
    return x_hat + (after - now).exp() * (z - x_hat)


def _ode(mean: Mean, noise: Noise, grid: Tensor) -> Tensor:
    """Euler steps (DDIM)."""
    z = grid[0].exp() * noise(0)
    for now, after in itertools.pairwise(grid):
        z = _euler(z, mean(z, now), now, after)
    return z


def _heun(mean: Mean, noise: Noise, grid: Tensor) -> Tensor:
    """Second order: the slope at both ends of a step; two evaluations each (EDM, arXiv 2206.00364)."""
    z = grid[0].exp() * noise(0)
    for now, after in itertools.pairwise(grid):
        slope = (z - mean(z, now)) / now.exp()
        end = z + (after.exp() - now.exp()) * slope
        z = z + (after.exp() - now.exp()) * 0.5 * (slope + (end - mean(end, after)) / after.exp())
    return z


def _dpm(mean: Mean, noise: Noise, grid: Tensor) -> Tensor:
    """DPM-Solver++(2M): second order from the step before, one evaluation each (arXiv 2211.01095)."""
    z = grid[0].exp() * noise(0)
    before, width = torch.zeros_like(z), torch.full_like(grid[0], math.inf)
    for now, after in itertools.pairwise(grid):
        x_hat = mean(z, now)
        target = x_hat + (now - after) / (2.0 * width) * (x_hat - before)
        z, before, width = _euler(z, target, now, after), x_hat, now - after
    return z


def _em(mean: Mean, noise: Noise, grid: Tensor) -> Tensor:
    """The reverse SDE: each step draws from q(z_after | z_now, x_hat)."""
    z = grid[0].exp() * noise(0)
    for i, (now, after) in enumerate(itertools.pairwise(grid)):
        kept = (2.0 * (after - now)).exp()
        z = mean(z, now) * (1.0 - kept) + kept * z + after.exp() * (1.0 - kept).sqrt() * noise(i + 1)
    return z


def _churn(mean: Mean, noise: Noise, grid: Tensor) -> Tensor:
    """Euler steps, each from a level raised by a fifth with fresh noise (EDM's churn; S_noise 1.003)."""
    z = grid[0].exp() * noise(0)
    for i, (now, after) in enumerate(itertools.pairwise(grid)):
        raised = now + math.log(1.2)
        z = z + 1.003 * (raised.exp().square() - now.exp().square()).sqrt() * noise(i + 1)
        z = _euler(z, mean(z, raised), raised, after)
    return z


# A sampler takes the denoiser, normals and a falling grid of ln sigma, and returns z at the lowest level.
SAMPLERS: dict[str, Callable[[Mean, Noise, Tensor], Tensor]] = {
    "ode": _ode, "heun": _heun, "dpm": _dpm, "em": _em, "churn": _churn
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- layers
class BitLMRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class BitLMMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class BitLMAttention(nn.Module):
    """Causal (or block-causal) self-attention of the backbone, with grouped queries and RoPE."""

    def __init__(self, config: BitLMConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = BitLMRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = BitLMRMSNorm(self.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: BlockCache | None, slots: Tensor | None
    ) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (_rotate(q, cos, sin), _rotate(k, cos, sin), v))
        if cache is not None and slots is not None:
            k = cache.keys[self.layer].index_copy_(2, slots, k)
            v = cache.values[self.layer].index_copy_(2, slots, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _rope(position: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `_rotate` multiplies with, [b, s, 1, d], for positions int64 [b, s]."""
    half = head_dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=position.device) / half
    angle = (position.double()[..., None] * theta**-exponent)[:, :, None, :]
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on [b, s, heads, d]: channel i turns together with channel i + d / 2."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class BitLMLayer(nn.Module):
    def __init__(self, config: BitLMConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = BitLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = BitLMAttention(config, layer)
        self.post_attention_layernorm = BitLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = BitLMMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, *attention: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class BitLMEmbedding(nn.Module):
    """Bits to width; the first K positions of a text are learned vectors."""

    def __init__(self, config: BitLMConfig) -> None:
        super().__init__()
        self.config = config
        self.start = nn.Parameter(torch.zeros(config.block_size, config.hidden_size))
        self.grouped = max(config.group_sizes) > 1
        if self.grouped:
            self.values = nn.Parameter(torch.zeros(_rows(config), config.hidden_size))
            self.pairs = _pairs(config, config.hidden_size)
        else:
            self.fc1 = nn.Linear(config.bits, config.hidden_size, bias=False)
            self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.memory = _memory(config, config.hidden_size)
        self.norm = BitLMRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, bits: Tensor, position_ids: Tensor, before: Tensor | None = None) -> Tensor:
        """bits int8 [b, s, B], of the tokens at the input positions [b, s]; before: those of the tokens before these,
        [b, R, B], for a memory."""
        if self.grouped:
            x = _name_of(self.values, self.pairs, group_values(self.config, bits))
        else:
            x = self.fc2(F.silu(self.fc1(bits.to(self.fc1.weight.dtype))))
        k = self.start.shape[0]
        if self.memory is not None:
            whole = bits if before is None else torch.cat((before, bits), dim=1)
            whole = F.pad(whole, (0, 0, max(self.memory.orders), 0))  # what is not known is not looked at
            x = x + self.memory(_begun_keys(group_values(self.config, whole))[..., -1], position_ids - k + 1)
        x = self.norm(x)
        return torch.where((position_ids < k)[..., None], self.start[position_ids.clamp(0, k - 1)], x)


class BlockCache:
    """Keys and values of all layers in buffers of a fixed length, [L, b, heads, slots, d]; filled from slot 0 on.

    `position_ids` int64 [b, slots] is each slot's position in its own row's text; -1 or less where there is nothing.
    """

    def __init__(self, config: BitLMConfig, rows: int, blocks: int, like: Tensor) -> None:
        slots = blocks * config.block_size
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, slots, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.position_ids = torch.full((rows, shape[3]), -1, device=like.device)

    def clear(self) -> None:
        """Forget what is in the slots (the buffers stay, and with them what was compiled for them)."""
        self.position_ids.fill_(-1)


class BitLMPreTrainedModel(PreTrainedModel):
    config: BitLMConfig
    config_class = BitLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["BitLMLayer", "BitLMHead"]  # noqa: RUF012  # transformers' own form
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        for name in ("start", "position", "values", "previous", "stages", "slots"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                nn.init.normal_(getattr(module, name), std=self.config.initializer_range)


class BitLMModel(BitLMPreTrainedModel):
    """The backbone."""

    code_table: Tensor

    def __init__(self, config: BitLMConfig) -> None:
        super().__init__(config)
        if config.vocab_size:
            digits = torch.arange(config.bits - 1, -1, -1)
            table = (((torch.arange(config.vocab_size)[:, None] >> digits) & 1) * 2 - 1).to(torch.int8)
            self.register_buffer("code_table", table)  # the plain binary code, until a checkpoint brings its own
        self.embed_tokens = BitLMEmbedding(config)
        self.layers = nn.ModuleList(BitLMLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = BitLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        past_key_values: BlockCache | None = None,
        slots: Tensor | None = None,
        before: Tensor | None = None,
    ) -> Tensor:
        """One pass over input positions; compiles as one graph, also with a cache.

        Args:
            input_ids: int64 [b, s], the ids at the *input* positions: position p holds token p - K (any id for p < K).
            position_ids: int64 [b, s], each row's own positions; negative ones are padding and seen by nobody.
            past_key_values: what earlier passes left; this one adds to it.
            slots: int64 [s], where in the cache these positions go.
            before: int64 [b, R], the ids before `input_ids`, as far as a memory looks back; None: there are none.

        Returns:
            [b, s, D]; the state at position p conditions token p.
        """
        x = self.embed_tokens(self.bits(input_ids), position_ids, None if before is None else self.bits(before))
        cos, sin = _rope(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        keys = position_ids
        if past_key_values is not None and slots is not None:
            keys = past_key_values.position_ids.index_copy_(1, slots, position_ids)
        mask = self._mask(position_ids, keys)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, past_key_values, slots)
        return self.norm(x)

    def bits(self, tokens: Tensor) -> Tensor:
        """Of ids [...] or records [..., bytes]: int8 [..., B] of -1 and +1."""
        return self.code_table[tokens] if self.config.vocab_size else unpack(tokens, self.config.bits)

    def _mask(self, query: Tensor, key: Tensor) -> Tensor:
        """bool [b, 1, q, k]. What is no token sees everything: a row that saw nothing would be not a number."""
        q, k = query[:, None, :, None], key[:, None, None, :]
        size = self.config.block_size if self.config.block_causal else 1
        return ((k >= 0) & (k // size <= q // size)) | (q < 0)


class HeadSight(NamedTuple):
    """Which tokens each token of a chain sees."""

    cos: Tensor  # [b, s, 1, d], as sin: their positions
    sin: Tensor
    mask: Tensor  # bool [b, 1, s, slots]
    slots: Tensor  # int64 [s], where they are put

    @classmethod
    def of(cls, config: BitLMConfig, position: Tensor, keys: Tensor, slots: Tensor, dtype: torch.dtype) -> HeadSight:
        """Of tokens at positions int64 [b, s] in their texts, and of slots with positions [b, slots]; -1 is padding."""
        back = position[:, :, None] - keys[:, None]
        sees = (back >= 0) & (back < config.head_window) & (keys[:, None] >= 0)
        head_dim = config.head_hidden_size // config.head_num_attention_heads
        rope = _rope(position, head_dim, config.rope_theta, dtype)
        return cls(*rope, (sees | (position[:, :, None] < 0))[:, None], slots)

    def at(self, here: slice, times: int) -> HeadSight:
        """Of some of the tokens, for so many groups, which are rows one after another."""
        cos, sin, mask = self.cos[:, here], self.sin[:, here], self.mask[:, :, here]
        if times > 1:
            cos, sin, mask = (t.repeat(times, 1, 1, 1) for t in (cos, sin, mask))
        return HeadSight(cos, sin, mask, self.slots[here])


class HeadCache:
    """Keys and values of a chain's newest tokens in buffers of a fixed length, [L, G, b, heads, slots, d]; the last K
    slots are for the block to come. `position` int64 [b, slots] says where the tokens are in their texts."""

    def __init__(self, config: BitLMConfig, groups: int, rows: int, slots: int, like: Tensor) -> None:
        heads = config.head_num_attention_heads
        shape = (config.head_num_layers, groups, rows, heads, slots, config.head_hidden_size // heads)
        self.keys, self.values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.position = torch.full((rows, slots), -1, device=like.device)

    def begin(self, position: Tensor) -> None:
        """A block at these positions int64 [b, K]: the one before it moves on, and the oldest tokens out."""
        k = position.shape[1]
        self.keys, self.values = self.keys.roll(-k, -2), self.values.roll(-k, -2)
        self.position = torch.cat((self.position[:, k:], position), dim=1)

    def copy(self) -> HeadCache:
        new = copy.copy(self)
        new.keys, new.values = self.keys.clone(), self.values.clone()
        return new


class BitLMHeadAttention(nn.Module):
    """Attention among the K tokens of one block; of a chain, among those that its mask shows."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def slide(self, x: Tensor, sight: HeadSight, keys: Tensor, values: Tensor) -> Tensor:
        """x [r, s, W]; keys and values [r, heads, slots, d] take in the new ones, each in its slot."""
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (t.transpose(1, 2) for t in (_rotate(q, *sight[:2]), _rotate(k, *sight[:2]), v))
        k, v = keys.index_copy_(2, sight.slots, k), values.index_copy_(2, sight.slots, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=sight.mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class BitLMHeadLayer(nn.Module):
    def __init__(self, config: BitLMConfig) -> None:
        super().__init__()
        self.self_attn = BitLMHeadAttention(config.head_hidden_size, config.head_num_attention_heads)
        self.mlp = BitLMMLP(config.head_hidden_size, config.head_intermediate_size)

    def forward(self, x: Tensor, modulation: Sequence[Tensor], *slide: Any) -> Tensor:
        """slide: what `BitLMHeadAttention.slide` takes, of a chain; nothing for attention inside the block."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        attention = self.self_attn.slide if slide else self.self_attn
        x = x + gate_a * attention(_modulate(x, shift_a, scale_a), *slide)
        return x + gate_m * self.mlp(_modulate(x, shift_m, scale_m))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.rms_norm(x, x.shape[-1:], eps=HEAD_EPS)
    return torch.addcmul(normed, normed, scale) + shift


class BitLMNoiseEmbedding(nn.Module):
    """ln sigma [...] to [..., W]: sinusoids of ln(sigma) / 4, then an MLP."""

    def __init__(self, size: int, levels: int) -> None:
        """levels: how many are told together, of the groups of bits; here all have that of the block."""
        super().__init__()
        self.levels = levels
        self.fc1 = nn.Linear(levels * FEATURES, size)
        self.fc2 = nn.Linear(size, size)

    def forward(self, log_sigma: Tensor) -> Tensor:
        features = torch.cat([_sinusoids(log_sigma)] * self.levels, dim=-1).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(features)))


def _sinusoids(log_sigma: Tensor) -> Tensor:
    """[...] to float32 [..., FEATURES]."""
    exponent = torch.linspace(0.0, math.log(100.0), FEATURES // 2, dtype=torch.float64, device=log_sigma.device)
    angle = (log_sigma * 0.25)[..., None] * exponent.exp().float()
    return torch.cat((torch.cos(angle), torch.sin(angle)), dim=-1)


class BitLMSeenLevels(nn.Module):
    """What a chain's group of bits is told of the noise on the groups before it and on the token before."""

    def __init__(self, size: int, groups: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(FEATURES, size, bias=False), nn.Linear(size, size, bias=False)
        self.slots = nn.Parameter(torch.zeros(2 * groups, size))  # groups of the token, those of the token before

    def forward(self, log_sigma: Tensor, decided: Tensor) -> Tensor:
        """float32 and bool [b, K, G] to [b, K, G, W]; nothing of what is decided."""
        told = self.fc1(_sinusoids(log_sigma).to(self.fc1.weight.dtype)) * ~decided[..., None]
        own, before = self.slots.chunk(2)
        of_before = F.pad((told * before).sum(-2), (0, 0, 1, 0))[:, :-1]
        return self.fc2(F.silu(_earlier(told * own) + of_before[:, :, None]))


class BitLMHead(nn.Module):
    """The head: `forward` for diffusion, `groups` for a chain."""

    def __init__(self, config: BitLMConfig) -> None:
        super().__init__()
        self.config, self.posterior = config, Posterior(config)
        size, chain = config.head_hidden_size, config.head_kind == "chain"
        grouped = chain or max(config.group_sizes) > 1
        outputs = _rows(config) if grouped else config.bits
        both = ("", "_last") if config.block_size > 1 else ("",)  # of a token's own state, of the last in its block
        if chain:
            self.previous = nn.Parameter(torch.zeros(_rows(config), size))  # of the token before
            self.stages = nn.Parameter(torch.zeros(len(config.group_sizes), size))
            if config.noisy_blocks:
                self.seen_levels = BitLMSeenLevels(size, len(config.group_sizes))
            if config.prior_rank:
                self.told, self.tied = (nn.Parameter(torch.zeros(_rows(config), config.prior_rank)) for _ in range(2))
                for end in both:
                    setattr(self, f"tie{end}_proj", nn.Linear(config.hidden_size, config.prior_rank, bias=False))
        else:
            self.in_proj = nn.Linear(config.bits, size, bias=False)
            if config.self_condition:
                self.estimate_proj = nn.Linear(config.bits, size, bias=False)
            if config.token_before:
                self.before_proj = nn.Linear(size, size, bias=False)
            self.noise_embed = BitLMNoiseEmbedding(size, len(config.group_sizes) if config.levels_apart else 1)
        if grouped:
            self.values = nn.Parameter(torch.zeros(_rows(config), size))
        self.pairs = _pairs(config, size)  # of the token before, or of likely values
        self.memory = _memory(config, size) if chain else None  # of the tokens before
        inner = chain and len(config.group_sizes) > 1
        self.inner_memory = _memory(config, size) if inner else None  # the same, and the groups before
        self.position = nn.Parameter(torch.zeros(config.block_size, size))
        for end in both:
            setattr(self, f"condition{end}_proj", nn.Linear(config.hidden_size, size, bias=False))
            if config.head_prior:
                setattr(self, f"prior{end}_proj", nn.Linear(config.hidden_size, outputs, bias=False))
        self.modulation = nn.Linear(size, 6 * size)
        self.layers = nn.ModuleList(BitLMHeadLayer(config) for _ in range(config.head_num_layers))
        self.final_modulation = nn.Linear(size, 2 * size)
        self.out_proj = nn.Linear(size, outputs, bias=False)

    def forward(
        self,
        z: Tensor,
        log_sigma: Tensor,
        hidden: Tensor,
        estimate: Tensor | None = None,
        newest: Tensor | None = None,
    ) -> Tensor:
        """z float32 [b, n, M, K, B], noisy bits; log_sigma float32 [b, n, M]; hidden [b, n, K, D].

        estimate: float32 [b, n, M, K, B], what an evaluation before took the clean bits for (`self_condition`).
        newest: int64 [b, n, G], values of the token before each block, -1 where there is none (`token_before`).

        Returns:
            [b, n, M, K, outputs]: what context and the other bits add to what a group's own noisy bits say.
        """
        sigma = log_sigma.exp()[..., None, None]
        dtype = self.in_proj.weight.dtype
        x = self.in_proj((z * torch.rsqrt(1.0 + sigma * sigma)).to(dtype))
        if estimate is not None:
            x = x + self.estimate_proj(estimate.to(dtype))
        prior = self.of_block("prior", hidden)[:, :, None] if self.config.head_prior else None
        if self.posterior.groups:
            likely = self.posterior.likely(z, sigma, prior if self.config.soft_prior else None).to(dtype)
            name = likely.flatten(-2) @ self.values
            name = name if self.pairs is None else name + self.pairs.expected(likely)
            x = x + name
            if newest is not None:
                clean = _name_of(self.values, self.pairs, newest.clamp(min=0)) * (newest[..., :1] >= 0)
                clean = clean[:, :, None, None].expand_as(name[..., :1, :])
                x = x + self.before_proj(torch.cat((clean, name[..., :-1, :]), dim=-2))
        context = self.of_block("condition", hidden)[:, :, None]  # [b, n, 1, K, W]
        condition = F.silu(self.noise_embed(log_sigma)[:, :, :, None] + context)
        rows = (x + context + self.position).flatten(0, 2)  # [b n M, K, W]
        features = self._layers(rows, self._modulation(condition.flatten(0, 2)))
        out = self.out_proj(features).view(*z.shape[:-1], -1)
        return out if prior is None else out + prior

    def groups(
        self,
        stages: slice,
        known: Tensor,
        context: Tensor,
        modulation: tuple[Tensor, Tensor],
        prior: Tensor | None,
        tie: Tensor | None,
        place: Tensor,
        sight: HeadSight,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """Log-probabilities of some groups' values, float32 [g, b, s, U]; minus infinity for what a smaller one lacks.

        Args:
            stages: the groups, of which there are g; G in `advance` of a chain, one where memory matters.
            known: [g, b, s, W], embeddings of the token before and of the groups before each.
            modulation: these groups' of `modulations`.
            context, prior: [b, s, W] and [b, s, outputs], what `of_block` says of the states.
            tie: [g, b, s, rank], what `tie` says of the states and of the groups before each; None: nothing.
            place: int64 [s], each token's place in its block.
            sight: of rows [g b].
            keys, values: [L, g, b, heads, slots, d], what these groups have of the tokens before; take these in.
        """
        count, shape = len(self.config.group_sizes), known.shape
        rows = (known + context + self.position[place]).flatten(0, 1)
        own = (modulation[0].flatten(0, 1), modulation[1].flatten(0, 1))
        features = self._layers(rows, own, sight, keys, values)
        weight = self.out_proj.weight.unflatten(0, (count, -1))[stages]
        features = features.view(shape[0], shape[1] * shape[2], shape[3])
        logits = (features @ weight.transpose(1, 2)).unflatten(1, shape[1:3])
        if prior is not None:
            logits = logits + prior.unflatten(-1, (count, -1))[..., stages, :].movedim(2, 0)
        if tie is not None:
            logits = logits + torch.einsum("gbsr,gur->gbsu", tie, self.tied.unflatten(0, (count, -1))[stages])
        return self.posterior.log_softmax(logits.float().movedim(0, 2), stages).movedim(2, 0)

    def modulations(self, context: Tensor, stages: slice, level: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """The modulation of the layers and of the last norm, [g, b, s, 6 W] and [g, b, s, 2 W], for `groups`.

        They do not depend on what is drawn: a block's are made at once, with one reading of the weights.
        level: [g, b, s, W], of `seen_levels`.
        """
        return self._modulation(F.silu(self.stages[stages, None, None] + level + context))

    def _modulation(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        return self.modulation(condition), self.final_modulation(condition)

    def _layers(
        self,
        rows: Tensor,
        modulation: tuple[Tensor, Tensor],
        sight: HeadSight | None = None,
        *past: Tensor,
    ) -> Tensor:
        """rows [r, s, W] and their modulation to what the projection onto outputs takes, [r, s, W]."""
        each, last = modulation[0].chunk(6, dim=-1), modulation[1]
        for i, layer in enumerate(self.layers):
            rows = layer(rows, each, *(() if sight is None else (sight, *(t[i].flatten(0, 1) for t in past))))
        shift, gain = last.chunk(2, dim=-1)
        return _modulate(rows, shift, gain)

    def tie(self, states: Tensor | None, values: Tensor, likely: Tensor | None = None) -> Tensor | None:
        """What ties a token's groups in the prior: `of_block("tie")` of its state, [b, s, rank], times what is decided
        before each group, of values int64 [b, s, G]; [G, b, s, rank]. likely: [b, s, G, U], if they are not certain."""
        if states is None:
            return None
        told = _look_up(self.told, values) if likely is None else _mean(self.told, likely)
        return (states[:, :, None] * _earlier(told)).movedim(2, 0)

    def of_block(self, name: str, hidden: Tensor) -> Tensor:
        """hidden [b, n, K, D]: linear in a token's own state and in the state of its block's last row."""
        out = getattr(self, f"{name}_proj")(hidden)
        last = getattr(self, f"{name}_last_proj", None)
        return out if last is None else out + last(hidden[:, :, -1:])


# ------------------------------------------------------------------------------------------------- outputs
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


class BitLMForCausalLM(BitLMPreTrainedModel, GenerationMixin):
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
        return self._values_before(_fill_front(ids, k, 0)[:, k - 1 : -1 : k], block > lead[:, None])

    def _values_before(self, tokens: Tensor, known: Tensor) -> Tensor | None:
        """Of the tokens before n blocks, ids [b, n], where there is one, bool [b, n]: int64 [b, n, G] for the head, -1
        where there is none; None for a head that does not look."""
        if not self.config.token_before:
            return None
        return group_values(self.config, self.model.bits(tokens)).masked_fill(~known[..., None], -1)

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
            nats = _Chain(self, len(ids)).bound(ids, states, block, sequence, overlap, noise_samples, seed)
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
        chain = _Chain(self, len(ids))
        return chain.read(ids, states, position).unflatten(1, (-1, k))

    def check_generation(self, generation_config: GenerationConfig, tokenizer: Any = None) -> None:
        """ValueError or TypeError for what `generate` would not take of a GenerationConfig."""
        self._settings(generation_config, {}, 0, tokenizer)

    def _settings(self, base: GenerationConfig | None, kwargs: dict[str, Any], given: int, tokenizer: Any) -> _Settings:
        kind, records = self.config.head_kind, not self.config.vocab_size
        settings = _Settings.read(base, kwargs, given, tokenizer, kind, records)
        if settings.guidance != 1.0 and not self.config.condition_drop:
            raise ValueError(f"generate: guidance={settings.guidance:g} {UNGUIDED}")
        if settings.overlap:
            self._check_front("generate", settings.overlap)
        return settings

    def _check_front(self, what: str, overlap: float) -> None:
        if not self.config.noisy_blocks:
            raise ValueError(f"{what}: overlap={overlap:g} {NO_FRONT}")
        if not overlap >= 1.0:
            raise ValueError(f"{what}: overlap={overlap:g} has to be 1 or above, or inf")

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        sequence_ids: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Continue texts, a block of K tokens at a time; every row is what it would be alone.

        A prompt is filled up in front to whole blocks with end-of-document tokens. While a text is not longer than the
        model was trained for, all of it is context. After that the context is moved on by half of that length whenever
        it is full, and read again.

        Args:
            inputs, input_ids: int64 [b, S], S may be 0; the same under two names, as in transformers.
            generation_config: instead of the model's own; keyword arguments win over it.
            attention_mask: [b, S], 0 where a row has no token (prompts of different lengths).
            streamer: gets the prompt and then tokens, as transformers' streamers expect it.
            tokenizer: needed for `stop_strings`.
            sequence_ids: int64 [b], keys of the noise; default 0, 1, ... The same (seed, sequence) gives the same text.
            kwargs: max_new_tokens or max_length, eos_token_id, pad_token_id, stop_strings (looked for in the new text;
                records have no end), seed; of a diffusion head steps (at least 2) and sampler (a key of SAMPLERS), of a
                chain temperature and ahead (tokens of which all groups are guessed and checked at once; default 0: one
                group after another. The text does not depend on it, but for rounding); of one that has learned from
                noisy blocks also overlap (default 0: none; 1 and above: a front of noise over so many groups; inf: all
                of a block together) and steps (evaluations of the head a block; default: as many as it has groups).
                guidance (default 1): unconditional + guidance * (conditional - unconditional) of the head's outputs,
                at the price of a second evaluation of the head where it is not 1. Unconditional is the head without
                the backbone's states of the block that is being drawn, as training had it (condition_drop); a chain
                goes on seeing the newest tokens, those of earlier blocks with their conditions.

        Returns:
            int64 [b, S + new]: the given ids and the new ones; what follows a row's end is pad_token_id.

        Raises:
            ValueError: an argument that means nothing here (sampling temperature, beams, ...), a wrong value, or
                guidance of a model that was trained without condition_drop.
        """
        if (inputs is None) == (input_ids is None):
            raise ValueError("generate: give the prompt once, as `inputs` or as `input_ids`")
        given = inputs if input_ids is None else input_ids
        assert given is not None
        settings = self._settings(generation_config or self.generation_config, kwargs, given.shape[1], tokenizer)
        k, device = self.config.block_size, self.device
        tokens, lead = self._blocks(given.to(device), attention_mask)
        sequence = self._sequences(sequence_ids, len(given))
        if streamer is not None:
            streamer.put(given.cpu())
        rows = [_Row(settings, prompt) for prompt in self._prompts(given, attention_mask, settings)]
        context = _Context(self, lead.tolist(), tokens.shape[1] // k + -(-settings.max_new_tokens // k))
        chain = _Chain(self, len(given)) if self.config.head_kind == "chain" else None
        made: list[Tensor] = []  # columns of new tokens
        while len(made) < settings.max_new_tokens and any(row.open for row in rows):
            states, position = context.advance(tokens)
            index = tokens.shape[1] // k - lead
            if chain is not None:
                block = chain.advance(tokens, states, position, settings, sequence, index)
            else:
                own = states[:, -k:].contiguous()  # one layout: one graph
                newest = self._values_before(_fill_front(tokens[:, -1:], 1, 0)[:, -1:], index[:, None] > 0)
                block = self._denoise(own, newest, settings, sequence, index)
            tokens = torch.cat((tokens, block), dim=1)
            for column in block.transpose(0, 1).cpu():
                if len(made) < settings.max_new_tokens and any(row.open for row in rows):
                    if self.config.vocab_size:
                        taken = [row.take(token) for row, token in zip(rows, column.tolist(), strict=True)]
                        column = torch.tensor(taken)
                    made.append(column)
                    if streamer is not None:
                        streamer.put(column)
        if streamer is not None:
            streamer.end()
        return torch.cat((given, torch.stack(made, dim=1).to(given.device)), dim=1)

    def _denoise(
        self, hidden: Tensor, newest: Tensor | None, settings: _Settings, sequence: Tensor, block: Tensor
    ) -> Tensor:
        """hidden [b, K, D], sequence and index of the block in its text [b] to ids int64 [b, K]."""
        k, bits = self.config.block_size, self.config.bits
        states, grid = hidden[:, None], self.noise.grid(settings.steps, hidden.device)

        def noise(i: int) -> Tensor:
            return gaussian(settings.seed, SAMPLING, sequence, block[:, None], 1, k, bits, i)

        estimate = torch.zeros_like(noise(0)) if self.config.self_condition else None  # of the evaluation before

        def logits(z: Tensor, log_sigma: Tensor) -> Tensor:
            level = log_sigma.expand(len(z), 1, 1)
            outputs = self.head(z, level, states, estimate, newest)
            if settings.guidance != 1.0:
                other = self.head(z, level, torch.zeros_like(states), estimate, newest)
                outputs = _guide(outputs, other, settings.guidance)
            return self.posterior.logits(outputs, z, log_sigma.exp())

        def denoised(z: Tensor, log_sigma: Tensor) -> Tensor:
            nonlocal estimate
            mean = self.posterior.mean(logits(z, log_sigma))
            estimate = mean if self.config.self_condition else None
            return mean

        z = SAMPLERS[settings.sampler](denoised, noise, grid)
        final = logits(z, grid[-1])[:, 0, 0]
        if not self.config.vocab_size:
            return pack(self.posterior.likeliest(final))
        return self.posterior.nearest_token(final, self.model.code_table)

    def _blocks(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows moved to the right and filled up in front to whole blocks: ids [b, n K], empty blocks in front [b]."""
        k, fill = self.config.block_size, self._eos() if self.config.vocab_size else 0
        length = torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)
        if attention_mask is not None:
            mask = attention_mask.to(input_ids.device).bool()
            order = mask.int().argsort(dim=1, stable=True)
            rest = (1,) * (input_ids.dim() - 2)
            missing = ~mask.gather(1, order).view(*order.shape, *rest)
            input_ids = input_ids.gather(1, order.view(*order.shape, *rest).expand_as(input_ids))
            input_ids = input_ids.masked_fill(missing, fill)
            length = mask.sum(1)
        blocks = -(-length // k)
        width = int(blocks.max()) * k if len(blocks) else 0
        ids = _fill_front(input_ids, width - input_ids.shape[1], fill)
        return ids, width // k - blocks

    def _states(self, ids: Tensor, lead: Tensor) -> Tensor:
        """ids [b, n K] and empty blocks in front [b] to the backbone's states [b, (n + 1) K, D]."""
        k = self.config.block_size
        position = torch.arange(ids.shape[1] + k, device=ids.device) - lead[:, None] * k
        return self.model(_fill_front(ids, k, 0), position)

    def _sequences(self, sequence_ids: Tensor | Sequence[int] | None, rows: int) -> Tensor:
        values = torch.as_tensor(range(rows) if sequence_ids is None else sequence_ids, dtype=torch.int64)
        if values.shape != (rows,):
            raise ValueError(f"sequence_ids of shape {tuple(values.shape)}: give one number for each of {rows} rows")
        return values.to(self.device)

    def _prompts(self, given: Tensor, attention_mask: Tensor | None, settings: _Settings) -> list[list[int]]:
        """The ids of each row, if stop strings are looked for: what a new token's text is depends on them."""
        if not settings.stop_strings:
            return [[] for _ in given]
        rows, mask = given.tolist(), torch.ones_like(given) if attention_mask is None else attention_mask
        return [list(itertools.compress(row, here)) for row, here in zip(rows, mask.tolist(), strict=True)]

    def _eos(self) -> int:
        eos = self.generation_config.eos_token_id if self.generation_config is not None else None
        if eos is None:
            raise ValueError("generation_config.eos_token_id is not set; texts are filled up with it to whole blocks")
        return eos[0] if isinstance(eos, list) else eos


# ------------------------------------------------------------------------------------------------- text
REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character, or none yet
# Bytes that show what of a text is not final: one that is in no character, what may complete one that has begun, and
# one that is a character.
_NEXT_BYTES = ((0xFF,), (0x80,), (0x80, 0x80), (0x80, 0x80, 0x80), (0xA0, 0x80), (0x90, 0x80, 0x80), (0x41,))


def common(a: str, b: str) -> int:
    """Length of the longest beginning that both have."""
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


class Decoder:
    """Token ids to text, and how far the text of some ids is final whatever token comes next.

    A token has no text of its own: its space may be that of a text's beginning, its bytes may be a part of a
    character, and in some tokenizers one wrong byte spoils the right ones beside it. Nothing here knows which
    tokenizer it is.
    """

    def __init__(self, decode: Callable[[list[int]], str], id_of: Callable[[str], Any] | None = None) -> None:
        """
        Args:
            decode: ids to text, without special tokens, and nothing cleaned up.
            id_of: the id of a token by its name; what it returns for a name that is none does not matter.
        """
        self.decode = decode
        found = {byte: self._byte(byte, id_of) for byte in (0x41, 0x80, 0x90, 0xA0, 0xFF)} if id_of is not None else {}
        known = [[found.get(byte) for byte in following] for following in _NEXT_BYTES]
        self._probes = [[i for i in ids if i is not None] for ids in known if None not in ids]
        self._closes: dict[int, bool] = {}

    @classmethod
    def of(cls, tokenizer: Any) -> Decoder:
        """Of a tokenizer with transformers' methods."""

        def decode(ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

        return cls(decode, getattr(tokenizer, "convert_tokens_to_ids", None))

    def _byte(self, byte: int, id_of: Callable[[str], Any]) -> int | None:
        """The token of one of these bytes: by its number, or by the letter that byte-level vocabularies give it."""
        letter = chr(byte) if byte in (0x41, 0xFF) else chr(0x122 + byte - 0x80)
        for name in (f"<0x{byte:02X}>", letter):
            token = id_of(name)
            if isinstance(token, int) and token >= 0 and self.decode([token]) == ("A" if byte == 0x41 else REPLACEMENT):
                return token
        return None

    def behind(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """The text of `new` behind `prompt`: what the text of both has behind that of the prompt.

        Where the text of both does not begin with the prompt's (which ends inside a character, say, that `new`
        completes), it is what follows the part that they share.
        """
        before, both = self.decode([*prompt]), self.decode([*prompt, *new])
        return both[common(before, both) :]

    def closes(self, token: int) -> bool:
        """Whether a text that ends with this token is final, whatever was before and whatever comes."""
        if token not in self._closes:
            own = self.decode([token])
            kept = (self.decode([token, *ids]).startswith(own) for ids in self._probes)
            self._closes[token] = bool(own) and not own.endswith(REPLACEMENT) and all(kept)
        return self._closes[token]

    def final(self, ids: list[int], text: str) -> int:
        """How many characters of `text`, the text of `ids`, are final."""
        count = len(text)
        for following in self._probes:
            count = min(count, common(text, self.decode([*ids, *following])))
        if len(self._probes) < len(_NEXT_BYTES):  # not all of them are tokens: three bytes are the most of a beginning
            count -= min(3, count - len(text[:count].rstrip(REPLACEMENT)))
        return count

    def alike(self, some: list[int], others: list[int]) -> bool:
        """Whether bytes mean the same behind both."""
        a, b = self.decode(some), self.decode(others)
        for ids in self._probes:
            x, y = self.decode([*some, *ids]), self.decode([*others, *ids])
            if x[common(a, x) :] != y[common(b, y) :]:
                return False
        return True

    def tail(self, ids: Sequence[int]) -> list[int]:
        """The end of `ids`, as much as the text behind them depends on: from a whole character, and not only spaces."""
        size = 8
        while size < len(ids):
            start = len(ids) - size
            if self.closes(ids[start - 1]) and self.decode([*ids[start:]]).strip(" "):
                return [*ids[start:]]
            size += 1 if size < 64 else size
        return [*ids]


class Detokenizer:
    """The text of tokens behind a prompt, piece by piece: together the pieces are `Decoder.behind` of all tokens.

    What is out is never taken back: what a later token could change is held until none can. A token costs a few calls
    of `decode` with a few ids each, however long the text is.
    """

    def __init__(self, decoder: Decoder, prompt: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._before = decoder.tail(prompt)  # ids on which the text behind them may depend
        self._out = decoder.decode(self._before)  # text of `before` and of `new` that is out, or the prompt's
        self._new: list[int] = []
        self._wait = 0  # tokens that are held until it is tried again
        self.pending = ""  # text that is held, without characters that are not whole

    def add(self, *tokens: int) -> str:
        """The text that has become final."""
        self._new += tokens
        closed = self._decoder.closes(self._new[-1])
        if not closed and len(self._new) < self._wait:
            return ""
        ids = [*self._before, *self._new]
        now = self._decoder.decode(ids)
        final = len(now) if closed else self._decoder.final(ids, now)
        at = common(self._out, now)
        self.pending = now[max(at, final) :].rstrip(REPLACEMENT)
        if final == len(now):
            self._move(closed)
        else:
            self._out = now[:final] if final > at else self._out
            held = len(self._new)
            self._wait = held + held // 4 if held > 16 else 0  # a long wait costs no more than a short one, a token
        return now[at:final]

    def flush(self) -> str:
        """The rest, when nothing more comes."""
        now = self._decoder.decode([*self._before, *self._new])
        text = now[common(self._out, now) :]
        self._move(False)
        return text

    def _move(self, closed: bool) -> None:
        """All text is out: of the ids before it, keep few, behind which other ids mean what they do behind all.

        Decoders take spaces from the beginning of what they get, so the ids have to begin with something else, if there
        has been anything else.
        """
        decoder, new, self._new, self._wait, self.pending = self._decoder, self._new, [], 0, ""
        own, every = decoder.decode(new), [*self._before, *new]
        if own.strip(" ") and (closed or decoder.alike(new, every)):
            self._before, self._out = new, own
        elif not decoder.decode(self._before).strip(" ") or not decoder.alike(self._before, every):
            self._before = every if len(every) <= 64 else every[-32:]
            self._out = decoder.decode(self._before)
        else:
            self._out = decoder.decode(self._before)


class TextStream:
    """The text of tokens behind a prompt as it comes, up to the first of some stop strings.

    That is the one whose end comes first (of those that end together, the longest), wherever tokens begin and end. What
    may be the beginning of one is held.
    """

    def __init__(
        self, decoder: Decoder, prompt: Sequence[int] = (), stop: Sequence[str] = (), include: bool = False
    ) -> None:
        """include: whether the stop string is a part of the text."""
        self._text, self._stop, self._include, self._held = Detokenizer(decoder, prompt), stop, include, ""
        self.ended = False  # by a stop string

    def add(self, *tokens: int) -> str:
        """The text that may be shown now; nothing once it has ended."""
        if self.ended or not tokens:
            return ""
        text = self._held + self._text.add(*tokens)
        if (found := self._cut(text + self._text.pending)) is not None:
            return found
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The rest, when nothing more comes."""
        if self.ended:
            return ""
        text, self._held = self._held + self._text.flush(), ""
        found = self._cut(text)
        return text if found is None else found

    def _cut(self, text: str) -> str | None:
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if not found:
            return None
        self.ended, self._held = True, ""
        return text[: min(found)[0 if self._include else 1]]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


# ------------------------------------------------------------------------------------------------- generation
NO_FRONT = "needs a chain trained with diffusion.noisy_every above 0, and this model is none; leave it out"
UNGUIDED = "needs a model trained with diffusion.condition_drop above 0, and this one was not; leave it out, or 1"


def _guide(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598), of logits."""
    return unconditional + guidance * (conditional - unconditional)


def _gumbel(settings: _Settings, config: BitLMConfig, sequence: Tensor, block: Tensor, number: int = 0) -> Tensor:
    """Gumbel noise float32 [b, K, G, U] of a block: what decides its draws, whatever is evaluated when.

    number: of several of them.
    """
    shape = (config.block_size, len(config.group_sizes), 2 ** max(config.group_sizes))
    elements = torch.arange(-(-math.prod(shape) // 4), device=block.device)
    drawn = _uniforms(settings.seed, SAMPLING, sequence, block[:, None], 1, elements, number)
    uniforms = torch.stack(drawn, -1).flatten(1)
    return -(-uniforms[:, : math.prod(shape)].log()).log().unflatten(1, shape)


def _draw(log_p: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Values [...] from log-probabilities [..., U] by Gumbel noise: the same ones where those change a little."""
    return (log_p / temperature + noise if temperature else log_p).argmax(-1)


@dataclass
class _Settings:
    max_new_tokens: int
    eos: frozenset[int]
    pad: int
    stop_strings: tuple[str, ...]
    seed: int
    steps: int
    sampler: str
    temperature: float
    guidance: float
    ahead: int
    overlap: float
    decoder: Decoder | None  # where there are stop strings

    @classmethod
    def read(
        cls, base: GenerationConfig | None, kwargs: dict[str, Any], given: int, tokenizer: Any, kind: str, records: bool
    ) -> _Settings:
        values: dict[str, Any] = {
            "max_new_tokens": 128, "seed": 0, "steps": 32, "sampler": "ode", "temperature": 1.0, "guidance": 1.0,
            "ahead": 0, "overlap": 0.0,
        }  # fmt: skip
        other = {"temperature", "ahead", "overlap"}
        if kind == "chain":
            values["steps"] = 0  # as many as a block has groups
            front = kwargs.get("overlap") or getattr(base, "overlap", 0)
            other = {"sampler"} if front else {"sampler", "steps"}
        ends = set() if records else {"eos_token_id", "pad_token_id", "stop_strings"}
        known = {*values, "max_length", *ends} - other
        aside = {"transformers_version", "bos_token_id", "_from_model_config"}
        own = {k: v for k, v in (base.to_diff_dict() if base is not None else {}).items() if k not in aside}
        if "max_length" in kwargs:
            own.pop("max_new_tokens", None)
        unknown = sorted({*own, *kwargs} - known)
        if unknown:
            raise ValueError(
                f"generate: {unknown[0]} means nothing to a BitLM with a {kind} head{' over records' * records}; it "
                f"knows {', '.join(sorted(known))}"
            )
        for source in (own, {k: v for k, v in kwargs.items() if v is not None}):
            values.update(copy.copy(source))
        length = values.get("max_length")
        if length is not None and "max_new_tokens" not in {**own, **kwargs}:
            values["max_new_tokens"] = int(length) - given
        eos = values.get("eos_token_id")
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        pad = values.get("pad_token_id")
        stops = values.get("stop_strings") or ()
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if stops and tokenizer is None:
            raise ValueError("generate: stop_strings need the tokenizer as well (tokenizer=...)")
        least = 2 if kind == "diffusion" else 1
        if ("steps" in {**own, **kwargs} or least == 2) and int(values["steps"]) < least:
            raise ValueError(f"generate: steps={values['steps']} has to be at least {least}")
        if int(values["max_new_tokens"]) < 1:
            raise ValueError(f"generate: max_new_tokens={values['max_new_tokens']} has to be at least 1")
        _check_overlap(values)
        if not 0.0 <= float(values["temperature"]) < math.inf:
            raise ValueError(f"generate: temperature={values['temperature']} has to be 0 (the likeliest) or above")
        if not 0.0 <= float(values["guidance"]) < math.inf:
            raise ValueError(f"generate: guidance={values['guidance']} has to be 0 (no condition) or above; 1 is none")
        if int(values["ahead"]) < 0:
            raise ValueError(f"generate: ahead={values['ahead']} has to be 0 (one group after another) or above")
        if values["sampler"] not in SAMPLERS:
            raise ValueError(
                f"generate: sampler={values['sampler']!r} does not exist; choose one of {', '.join(SAMPLERS)}"
            )
        pad = pad if pad is not None else eos[0] if eos else 0
        return cls(
            int(values["max_new_tokens"]), frozenset(eos), pad, stops, int(values["seed"]), int(values["steps"]),
            str(values["sampler"]), float(values["temperature"]), float(values["guidance"]),
            int(values["ahead"]), float(values["overlap"]), Decoder.of(tokenizer) if stops else None,
        )  # fmt: skip


def _check_overlap(values: dict[str, Any]) -> None:
    overlap = float(values["overlap"])
    if overlap and not overlap >= 1.0:
        raise ValueError(f"generate: overlap={values['overlap']} has to be 0 (no front: the chain), or 1 or above")
    if overlap and int(values["ahead"]):
        raise ValueError(
            f"generate: ahead={values['ahead']} guesses what a chain draws, and overlap={overlap:g} is none"
        )


class _Row:
    """Whether a row goes on."""

    def __init__(self, settings: _Settings, prompt: list[int]) -> None:
        self.settings, self.open = settings, True
        self.text = None
        if settings.decoder is not None:
            self.text = TextStream(settings.decoder, prompt, settings.stop_strings)

    def take(self, token: int) -> int:
        """The token, or padding behind the end of the row."""
        s = self.settings
        if not self.open:
            return s.pad
        if token in s.eos:
            self.open = False
        elif self.text is not None:
            self.text.add(token)
            self.open = not self.text.ended
        return token


class _Context:
    """What the backbone has read of each row, and its cache.

    Where a row's context begins depends on how long its text is, and on nothing else: not on the batch, and not on
    which part of it was a prompt.
    """

    def __init__(self, model: BitLMForCausalLM, lead: list[int], blocks: int) -> None:
        config = model.config
        self.model, self.lead = model.model, lead
        self.k, self.most = config.block_size, config.max_position_embeddings // config.block_size
        self.reach = _reach(config) - 1
        self.begin: list[int] | None = None
        size = min(blocks, self.most)  # the start vectors and all blocks but the last: as many as there are blocks
        self.cache = BlockCache(config, len(lead), size, model.model.norm.weight)

    def window(self, blocks: int) -> int:
        """First block that is context of the next one, for a text of so many blocks."""
        hop = max(1, self.most // 2)
        return max(0, -(-(blocks - self.most + 1) // hop)) * hop

    def advance(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [b, n K], longer by one block each time.

        Returns:
            states [b, s, D] and the positions int64 [b, s] in the context of the tokens that they condition: of the
            block to come (s = K), or where the context begins anew of all of it.
        """
        k, blocks = self.k, tokens.shape[1] // self.k
        begin = [lead + self.window(blocks - lead) for lead in self.lead]
        before = None
        if begin == self.begin:
            inputs, slot = tokens[:, -k:], (blocks - min(begin)) * k
            if self.reach:  # as many every time: one graph
                before = _fill_front(tokens, self.reach, 0)[:, -k - self.reach : -k]
        else:
            self.begin = begin
            self.cache.clear()
            inputs, slot = _fill_front(tokens[:, min(begin) * k :], k, 0), 0
        slots = torch.arange(slot, slot + inputs.shape[1], device=tokens.device)
        empty = torch.tensor(begin, device=tokens.device)[:, None] - min(begin)
        position = slots - empty * k
        return self.model(inputs, position, self.cache, slots, before), position


class _Codes:
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


@dataclass
class _Draft:
    """A block that is being drawn."""

    before: Tensor  # int64 [b, N, G], values of the tokens before it that a head has to know
    values: Tensor  # int64 [b, K, G], final or guessed
    position: Tensor  # int64 [b, K]
    noise: Tensor  # [b, K, G, U], that draws it
    sight: HeadSight


class _Noise(NamedTuple):
    """What is seen of a block: groups that are decided as they are, others through noise."""

    decided: Tensor  # bool [b, K, G]
    log_sigma: Tensor  # float32 [b, K, G]
    z: Tensor  # float32 [b, K, B], noisy bits

    @classmethod
    def of(cls, config: BitLMConfig, noise: NoiseDistribution, come: Tensor, z: Tensor) -> _Noise:
        """come: float32 [b, K, G], how far groups have come; 0 is not begun, and nothing is known of its bits then."""
        begun = _of_bits(config, come > 0)
        return cls(come >= 1, noise.log_sigma(1.0 - come), torch.where(begun, z, torch.zeros_like(z)))


def _of_bits(config: BitLMConfig, x: Tensor) -> Tensor:
    """What groups have, [..., G], to each of their bits, [..., B]."""
    return x.repeat_interleave(torch.tensor(config.group_sizes, device=x.device), dim=-1)


def _progress(t: Tensor, groups: int, overlap: float) -> Tensor:
    """How far every group of a block has come at t: [...] to [..., K G] (megatron_bit/diffusion/front.py)."""
    if math.isinf(overlap):
        return t[..., None].expand(*t.shape, groups)
    return ((t[..., None] * (groups - 1 + overlap) - torch.arange(groups, device=t.device)) / overlap).clamp(0, 1)


class _Answer:
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

    def likely(self, head: BitLMHead, values: Tensor, noise: _Noise) -> Tensor:
        """Probabilities [b, K, G, U] of what the block's groups are, as they are seen; values int64 [b, K, G]."""
        sigma = _of_bits(head.config, noise.log_sigma).exp()
        likely = head.posterior.likely(noise.z, sigma, self.prior)
        return torch.where(noise.decided[..., None], F.one_hot(values, likely.shape[-1]).to(likely.dtype), likely)

    def through_noise(
        self, head: BitLMHead, known: Tensor, values: Tensor, likely: Tensor, noise: _Noise, sight: HeadSight
    ) -> Tensor:
        """As `evaluate`, of all groups of the whole block, [G, b, K, U], without what their own bits say."""
        level = head.seen_levels(noise.log_sigma, noise.decided).movedim(2, 0)
        return head.groups(
            slice(None), known, self.context, head.modulations(self.context, slice(None), level), self.prior,
            head.tie(self.tie, values, likely), torch.arange(values.shape[1], device=known.device),
            sight.at(slice(0, values.shape[1]), len(known)), self.cache.keys, self.cache.values,
        )  # fmt: skip


class _Chain:
    """A chain head at work: draws blocks, and keeps what its attention needs of the tokens before."""

    def __init__(self, model: BitLMForCausalLM, rows: int) -> None:
        self.head, self.config, self.bits, self.noise = model.head, model.config, model.model.bits, model.noise
        self.reach = _reach(model.config)
        self.codes = _Codes(self.config, model.model.code_table) if self.config.vocab_size else None
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
        head, own = self.head, _look_up(self.head.values, values)
        previous = behind[:, behind.shape[1] - values.shape[1] :]
        before = _name_of(head.previous, head.pairs, previous) * (position > 0)[..., None]
        if head.memory is None:
            return (before[:, :, None] + own.cumsum(-2) - own).movedim(2, 0)
        keys = _begun_keys(behind)[..., -1]
        before = before + head.memory(keys, position)
        known = before[:, :, None] + own.cumsum(-2) - own
        if head.inner_memory is not None:
            inner = head.inner_memory(keys, position, _begun_keys(values)[..., :-1])
            known = known + F.pad(inner, (0, 0, 1, 0))
        return known.movedim(2, 0)

    def _seen(self, draft: _Draft, likely: Tensor, noise: _Noise) -> Tensor:
        """`_known` of a block's groups [G, b, K, W], of which those have these probabilities; likely [b, K, G, U]."""
        head, own = self.head, _mean(self.head.values, likely)
        name = likely.flatten(-2) @ head.previous
        name = name if head.pairs is None else name + head.pairs.expected(likely)
        newest = _name_of(head.previous, head.pairs, draft.before[:, -1:]) * (draft.position[:, :1] > 0)[..., None]
        before = torch.cat((newest, name[:, :-1]), dim=1)
        if head.memory is None:
            return (before[:, :, None] + _earlier(own)).movedim(2, 0)
        whole, certain = noise.decided.all(-1), [draft.position[:, 0]]  # tokens before each that n-grams may end with
        for i in range(1, whole.shape[1]):
            certain.append(torch.where(whole[:, i - 1], torch.minimum(draft.position[:, i], certain[-1] + 1), 0))
        count = torch.stack(certain, dim=1)
        keys = _begun_keys(torch.cat((draft.before, draft.values), dim=1)[:, :-1])[..., -1]
        known = (before + head.memory(keys, count))[:, :, None] + _earlier(own)
        if head.inner_memory is not None:
            inner = head.inner_memory(keys, count, _begun_keys(draft.values)[..., :-1])
            inner = inner * (noise.decided.cumprod(-1)[..., :-1, None] > 0)
            known = known + F.pad(inner, (0, 0, 1, 0))
        return known.movedim(2, 0)

    def _through_noise(self, answers: list[_Answer], draft: _Draft, noise: _Noise, guidance: float) -> Tensor:
        """Log-probabilities [b, K, G, U] of all groups of a block, without what their own bits say."""
        found = []
        for answer in answers:
            likely = answer.likely(self.head, draft.values, noise).to(answer.context.dtype)
            known = self._seen(draft, likely, noise)
            found.append(answer.through_noise(self.head, known, draft.values, likely, noise, draft.sight))
        log_p, *other = found
        if other:
            log_p = torch.where(log_p > float("-inf"), _guide(log_p, other[0], guidance), log_p)
        return log_p.movedim(0, 2)

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
        context, prior, tied = self._of_block(states)
        place = torch.arange(ids.shape[1], device=ids.device) % self.config.block_size
        values = self._values(ids)
        behind = F.pad(values, (0, 0, self.reach, 0))[:, :-1]
        known, nats = self._known(values, behind, position), torch.zeros(ids.shape[:2], device=ids.device)
        tie = self.head.tie(tied, values)
        slots = torch.arange(ids.shape[1], device=ids.device)
        sight = HeadSight.of(self.config, position, position, slots, context.dtype)
        most = self.config.head_window - 1 + self.config.block_size
        self.cache = HeadCache(self.config, len(known), len(ids), most, context)
        kept = min(most, len(slots))  # the newest, as many as it has slots
        new, old = slice(len(slots) - kept, None), slice(most - kept, None)
        self.cache.position[:, old] = position[:, new]
        for i in range(len(known)):  # one group after another: the memory is that of one
            stage, own = slice(i, i + 1), HeadCache(self.config, 1, len(ids), len(slots), context)
            told = None if tie is None else tie[stage]
            given = (known[stage], context, self.head.modulations(context, stage), prior, told, place, sight)
            log_p = self.head.groups(stage, *given, own.keys, own.values)
            nats = nats - log_p[0].gather(-1, values[..., i, None]).squeeze(-1)
            self.cache.keys[:, stage, ..., old, :] = own.keys[..., new, :]
            self.cache.values[:, stage, ..., old, :] = own.values[..., new, :]
        return nats

    def advance(
        self, tokens: Tensor, states: Tensor, position: Tensor, settings: _Settings, sequence: Tensor, block: Tensor
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
            states, position: from `_Context.advance`.
            sequence, block: int64 [b], keys of the noise.
        """
        k, groups, b, device = self.config.block_size, len(self.config.group_sizes), len(tokens), states.device
        if states.shape[1] > k or self.cache is None:
            self.read(tokens[:, tokens.shape[1] - (states.shape[1] - k) :], states[:, :-k], position[:, :-k])
        before = self._values(_fill_front(tokens, self.reach, 0)[:, -self.reach :])
        noise, ahead = _gumbel(settings, self.config, sequence, block), settings.ahead
        answers = self._answers(states[:, -k:], settings.guidance, position[:, -k:])
        guess = self._guess(answers[0].prior if ahead else None, noise, settings.temperature)
        draft = self._draft(before, guess, noise, position[:, -k:], states.dtype)
        if settings.overlap:
            self._front(answers, draft, settings, sequence, block)
            return self._tokens(draft.values)
        first, done = 0, torch.zeros(b, 1, dtype=torch.int64, device=device)  # tokens and groups that are final
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
        return self._tokens(draft.values)

    def _evaluate(
        self, answers: list[_Answer], draft: _Draft, here: slice, stages: slice, settings: _Settings
    ) -> Tensor:
        """Draw the groups `stages` of the tokens at the places `here`, int64 [b, s, g], as if the draft were right."""
        values, whole = draft.values[:, here], torch.cat((draft.before, draft.values), dim=1)
        position, behind = draft.position[:, here], whole[:, here.start : here.stop + self.reach - 1]
        known = self._known(values, behind, position)[stages]
        log_p, *other = (answer.evaluate(self.head, stages, known, values, here, draft.sight) for answer in answers)
        if other:  # the same of log-probabilities as of logits, but for a constant
            log_p = torch.where(log_p > float("-inf"), _guide(log_p, other[0], settings.guidance), log_p)
        return self._draw(log_p.movedim(0, 2), values, draft.noise[:, here], stages, settings.temperature)

    def _front(
        self, answers: list[_Answer], draft: _Draft, settings: _Settings, sequence: Tensor, block: Tensor
    ) -> None:
        """Draw the groups of a block along a front: in each of the evaluations those that are on their way are drawn
        given their noisy bits, and their noise falls as if that were right (ancestral sampling)."""
        config, (k, groups) = self.config, draft.values.shape[1:]
        steps = settings.steps or k * groups
        come = _progress(torch.linspace(0, 1, steps + 1, device=draft.values.device), k * groups, settings.overlap)
        come = come.unflatten(1, (k, groups))[:, None].expand(-1, len(draft.values), -1, -1)
        z = torch.zeros(*draft.values.shape[:2], config.bits, device=draft.values.device)
        for i, (now, after) in enumerate(itertools.pairwise(come)):
            noise = _Noise.of(config, self.noise, now, z)
            log_p = self._through_noise(answers, draft, noise, settings.guidance)
            sigma = _of_bits(config, noise.log_sigma).exp()
            log_p = self.head.posterior.log_likely(noise.z, sigma, log_p.flatten(-2))
            fresh = _gumbel(settings, config, sequence, block, steps + 1 + i)  # a first draw has the chain's own
            drawn_by = torch.where((now > 0)[..., None], fresh, draft.noise)
            for j in range(groups):
                own = slice(j, j + 1)
                drawn = self._draw(log_p[..., own, :], draft.values, drawn_by, own, settings.temperature)
                draft.values[..., own] = torch.where(noise.decided[..., own], draft.values[..., own], drawn)
            x, later = _bits_of(config, draft.values), self.noise.log_sigma(1.0 - after)
            left = torch.where(_of_bits(config, now > 0), (_of_bits(config, later).exp() / sigma).square(), 0.0)
            eps = gaussian(settings.seed, SAMPLING, sequence, block[:, None], 1, k, config.bits, i + 1)[:, 0, 0]
            moved = x + left * (z - x) + _of_bits(config, later).exp() * (1.0 - left).clamp(min=0).sqrt() * eps
            z = torch.where(_of_bits(config, after > now), moved, z)
        self._take_in(answers[0], draft)

    def _take_in(self, answer: _Answer, draft: _Draft) -> Tensor:
        """The whole block as it is now, for those after it; log-probabilities of all groups, [b, K, G, U]."""
        behind = torch.cat((draft.before, draft.values), dim=1)[:, :-1]
        known, here = self._known(draft.values, behind, draft.position), slice(0, draft.values.shape[1])
        return answer.evaluate(self.head, slice(None), known, draft.values, here, draft.sight).movedim(0, 2)

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
        bits, padded = self.bits(ids).float().unflatten(1, (-1, k)), self._values(_fill_front(ids, self.reach, 0))
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
                come = _progress(t[:, n, m], k * count, overlap).unflatten(1, (k, count))
                log_sigma = self.noise.log_sigma(1.0 - come)
                sigma = _of_bits(config, log_sigma).exp()
                z = x + sigma * eps[:, n, m]
                log_p = self._through_noise(answers, draft, _Noise.of(config, self.noise, come, z), 1.0)
                error = posterior.squared_error(posterior.log_likely(z, sigma, log_p.flatten(-2)), x)
                weight = ((come > 0) & (come < 1)) / (log_sigma.exp().square() * self.noise.density(log_sigma))
                total[:, n] += (error * _of_bits(config, weight)).sum(-1) * (speed / samples)
            clean = self._take_in(answers[0], draft).flatten(-2)
            sigma = torch.full_like(x[..., :1], self.noise.sigma_min)
            read = posterior.log_likely(x + sigma * last[:, n], sigma, clean)
            total[:, n] += posterior.cross_entropy(read, x).sum(-1)
        return total + config.bits / (2.0 * self.noise.sigma_max**2)

    def _draft(self, before: Tensor, values: Tensor, noise: Tensor, position: Tensor, dtype: torch.dtype) -> _Draft:
        """A block at these positions int64 [b, K], for which the cache has room (`_answers`)."""
        assert self.cache is not None
        keys, k = self.cache.position, position.shape[1]
        slots = torch.arange(keys.shape[1] - k, keys.shape[1], device=keys.device)
        return _Draft(before, values, position, noise, HeadSight.of(self.config, position, keys, slots, dtype))

    def _answers(self, states: Tensor, guidance: float, position: Tensor) -> list[_Answer]:
        """What answers for the next block, with these states [b, K, D] and positions [b, K]; with guidance also what
        does without them."""
        context, prior, tie = self._of_block(states)
        assert self.cache is not None
        self.cache.begin(position)
        answers = [_Answer(self.head, context, prior, tie, self.cache)]
        if guidance != 1.0:
            answers.append(_Answer(self.head, torch.zeros_like(context), None, None, self.cache.copy()))
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
        return _draw(log_p, noise[:, :, stages], temperature)

    def _tokens(self, values: Tensor) -> Tensor:
        """Values int64 [..., G] to ids or records."""
        return pack(_bits_of(self.config, values)) if self.codes is None else self.codes.tokens(values)


def _where_given(nats: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Values of right-aligned, filled-up rows back to where the tokens stood; 0 for padding."""
    length, have = input_ids.shape[1], nats.shape[1]
    nats = F.pad(nats, (length - have, 0))  # cuts, where negative
    if attention_mask is None:
        return nats
    mask = attention_mask.to(nats.device).bool()
    order = mask.int().argsort(dim=1, stable=True)
    return torch.zeros_like(nats).scatter(1, order, nats).masked_fill(~mask, 0.0)
