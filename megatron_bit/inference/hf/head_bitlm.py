"""The head that decides the tokens of a block."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone_bitlm import BitLMMLP, rope, rotate
from .bits_bitlm import table_rows
from .configuration_bitlm import BitLMConfig
from .embedding_bitlm import earlier, look_up, make_memory, make_pairs, mean_of, name_of
from .posterior_bitlm import Posterior

HEAD_EPS = 1e-6  # of the head's norms
FEATURES = 128  # sinusoids of the noise level


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
        turn = rope(position, head_dim, config.rope_theta, dtype)
        return cls(*turn, (sees | (position[:, :, None] < 0))[:, None], slots)

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
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, *sight[:2]), rotate(k, *sight[:2]), v))
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
        return self.fc2(F.silu(earlier(told * own) + of_before[:, :, None]))


class BitLMHead(nn.Module):
    """The head: `forward` for diffusion, `groups` for a chain."""

    def __init__(self, config: BitLMConfig) -> None:
        super().__init__()
        self.config, self.posterior = config, Posterior(config)
        size, chain = config.head_hidden_size, config.head_kind == "chain"
        grouped = chain or max(config.group_sizes) > 1
        outputs = table_rows(config) if grouped else config.bits
        both = ("", "_last") if config.block_size > 1 else ("",)  # of a token's own state, of the last in its block
        if chain:
            self.previous = nn.Parameter(torch.zeros(table_rows(config), size))  # of the token before
            self.stages = nn.Parameter(torch.zeros(len(config.group_sizes), size))
            if config.noisy_blocks:
                self.seen_levels = BitLMSeenLevels(size, len(config.group_sizes))
            if config.prior_rank:
                self.told, self.tied = (
                    nn.Parameter(torch.zeros(table_rows(config), config.prior_rank)) for _ in range(2)
                )
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
            self.values = nn.Parameter(torch.zeros(table_rows(config), size))
        self.pairs = make_pairs(config, size)  # of the token before, or of likely values
        self.memory = make_memory(config, size) if chain else None  # of the tokens before
        inner = chain and len(config.group_sizes) > 1
        self.inner_memory = make_memory(config, size) if inner else None  # the same, and the groups before
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
                clean = name_of(self.values, self.pairs, newest.clamp(min=0)) * (newest[..., :1] >= 0)
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
        told = look_up(self.told, values) if likely is None else mean_of(self.told, likely)
        return (states[:, :, None] * earlier(told)).movedim(2, 0)

    def of_block(self, name: str, hidden: Tensor) -> Tensor:
        """hidden [b, n, K, D]: linear in a token's own state and in the state of its block's last row."""
        out = getattr(self, f"{name}_proj")(hidden)
        last = getattr(self, f"{name}_last_proj", None)
        return out if last is None else out + last(hidden[:, :, -1:])
