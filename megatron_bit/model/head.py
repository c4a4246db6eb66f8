"""The heads: light transformers over the K tokens of one block, tensor-parallel. Here what all have, and the denoiser.

Letters of shapes: model/__init__.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mbit_kernels.swiglu import swiglu
from torch import Tensor, nn

from megatron_bit.config import Config
from megatron_bit.diffusion.noised import network_input, token_sigma
from megatron_bit.diffusion.posterior import BitPosterior, GroupPosterior
from megatron_bit.model.attention import RotaryEmbedding
from megatron_bit.model.layers import (
    PARTIAL,
    column,
    fp8_linear,
    init_device,
    level_features,
    level_frequencies,
    linear,
    make_pairs,
    name_of,
    row,
    value_table,
)
from megatron_bit.model.noisy import NoisyPlace, attend
from megatron_bit.parallel.split import FREQUENCIES

EPS = 1e-6  # of the head's norms


class NoiseLevelEmbedding(nn.Module):
    """ln sigma to W channels: sinusoidal features of ln(sigma) / 4 (EDM's c_noise), then an MLP."""

    def __init__(self, mcore: Any, width: int, levels: int) -> None:
        """levels: L, how many are told together."""
        super().__init__()
        self.fc1 = linear(mcore, levels * FREQUENCIES, width, bias=True)
        self.fc2 = linear(mcore, width, width, bias=True)
        self.frequency = level_frequencies(mcore)

    def forward(self, log_sigma: Tensor) -> Tensor:
        """float32 [..., L] to [..., W]."""
        features = level_features(log_sigma, self.frequency).flatten(-2).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(features)))


class HeadLayer(nn.Module):
    """Attention (inside the block, or causal in a sliding window) and SwiGLU, modulated by AdaLN; split over TP."""

    def __init__(self, config: Config, mcore: Any, tp_group: Any, rope: RotaryEmbedding | None) -> None:
        """rope: of a head whose attention slides over the sequence; None for one that stays in its block."""
        super().__init__()
        h = config.model.head
        self.rope, self.window, self.kernels = rope, h.window, mcore.kernels
        self.block_size = config.model.block_size
        self.head_dim = h.hidden_size // h.num_heads
        self.qkv = column(mcore, tp_group, h.hidden_size, 3 * h.hidden_size)
        self.proj = row(mcore, tp_group, h.hidden_size, h.hidden_size)
        self.fc1 = column(mcore, tp_group, h.hidden_size, 2 * h.ffn_hidden_size)
        self.fc2 = row(mcore, tp_group, h.ffn_hidden_size, h.hidden_size)

    def forward(
        self, x: Tensor, modulation: tuple[Tensor, ...], start: Tensor | None = None, noisy: NoisyPlace | None = None
    ) -> Tensor:
        """x [s, R, W]; modulation: six tensors [s, R, W] (shift, scale, gate of attention, then of SwiGLU).

        start: int64 [b, S], the first position that a sliding window may reach; rows of a sample stand together.
        noisy: of what stands behind this rank's part of the sequence in x.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        norm = self.kernels.modulated_rms_norm
        x = x + gate_a * self._attention(norm(x, shift_a, scale_a, EPS), start, noisy)
        return x + gate_m * self._mlp(norm(x, shift_m, scale_m, EPS))

    def _attention(self, x: Tensor, start: Tensor | None, noisy: NoisyPlace | None) -> Tensor:
        mixed, _ = self.qkv(x)  # [S, R, heads/tp * 3 * d]
        if self.rope is not None:
            if noisy is None:
                return self.proj(self._slide(mixed, self.rope, start))[0]
            return self.proj(self._slide_and_noisy(mixed, self.rope, start, noisy))[0]
        length, rows = mixed.shape[:2]
        mixed = mixed.view(length // self.block_size, self.block_size, rows, -1, 3, self.head_dim)
        q, k, v = mixed.permute(4, 0, 2, 3, 1, 5).unbind(0)  # each [n, R, heads/tp, K, d]
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.permute(0, 3, 1, 2, 4).reshape(length, rows, -1))[0]

    def _slide_and_noisy(self, mixed: Tensor, rope: RotaryEmbedding, start: Tensor | None, noisy: NoisyPlace) -> Tensor:
        """`_slide` of the sequence, and the attention of the noisy blocks behind it; under sequence parallelism each
        rank's are behind its part."""
        count = len(noisy.block) * self.block_size  # of all ranks
        shards = len(noisy.block) // len(noisy.counts)
        parts = mixed.unflatten(0, (shards, -1))
        own = parts.shape[1] - count // shards
        clean, behind = parts[:, :own].flatten(0, 1), parts[:, own:].flatten(0, 1)
        (q, k, v), (_, keys, values) = (t.unflatten(2, (-1, 3, self.head_dim)).unbind(3) for t in (behind, clean))
        length = len(clean)
        position = noisy.positions.repeat_interleave(q.shape[1] // noisy.block.shape[1], dim=1)
        q, k, keys = rope(q, position, length), rope(k, position, length), rope(keys)
        out = attend(q, k, v, keys, values, noisy, self.window, start)
        out = torch.cat((self._slide(clean, rope, start).unflatten(0, (shards, -1)), out.unflatten(0, (shards, -1))), 1)
        return out.flatten(0, 1)

    def _slide(self, mixed: Tensor, rope: RotaryEmbedding, start: Tensor | None) -> Tensor:
        """Causal attention to `window` tokens, [S, R, heads/tp * 3 * d] to [S, R, heads/tp * d].

        In chunks of `window` queries, each with its own chunk and the one before: the cost grows with S, not S^2.
        """
        size, (length, rows) = self.window, mixed.shape[:2]
        q, k, v = mixed.view(length, rows, -1, 3, self.head_dim).unbind(3)
        chunks = [F.pad(t, (0, 0, 0, 0, 0, 0, 0, -length % size)) for t in (rope(q), rope(k), v)]
        q, k, v = (
            t.unflatten(0, (-1, size)).permute(0, 2, 3, 1, 4).flatten(1, 2) for t in chunks
        )  # [N, R heads, w, d]
        k, v = (torch.cat((F.pad(t, (0, 0, 0, 0, 0, 0, 1, 0))[:-1], t), dim=2) for t in (k, v))
        query, key = torch.arange(size, device=q.device)[:, None], torch.arange(2 * size, device=q.device)
        sees = (key > query) & (key <= query + size)  # key j stands at query position j - w
        place = key - size + size * torch.arange(len(q), device=q.device)[:, None]  # of the keys, in the sequence
        if start is None:  # nothing stands before the first chunk
            mask = (sees & (place >= 0)[:, None])[:, None]
        else:
            reach = F.pad(start, (0, -length % size)).unflatten(1, (-1, size)).transpose(0, 1)  # [N, b, w]
            mask = sees & (place[:, None, None] >= reach[..., None])  # [N, b, w, 2 w]
            mask = mask.repeat_interleave(q.shape[1] // len(start), dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).unflatten(1, (rows, -1))
        return out.permute(0, 3, 1, 2, 4).flatten(0, 1)[:length].flatten(2)

    def _mlp(self, x: Tensor) -> Tensor:
        return self.fc2(swiglu(self.fc1(x)[0]))[0]


class BlockHead(nn.Module):
    """What the heads of a block have in common: the condition, the layers, and the prior.

    A token is conditioned on its own row of the backbone's states and on the last row of its block. That one stands on
    the newest token there is; without it the nearest context reaches the head only through the backbone's attention
    (docs/quality.md has what it is worth).
    """

    rope: RotaryEmbedding | None = None

    def __init__(self, config: Config, mcore: Any, tp_group: Any, outputs: int) -> None:
        super().__init__()
        m, w = config.model, config.model.head.hidden_size
        self.block_size, self.kernels = m.block_size, mcore.kernels
        self.position = nn.Parameter(torch.empty(m.block_size, w, dtype=mcore.params_dtype, device=init_device(mcore)))
        self.condition = fp8_linear(mcore, m.hidden_size, w)
        self.condition_last = linear(mcore, m.hidden_size, w) if m.block_size > 1 else None
        self.modulation = fp8_linear(mcore, w, 6 * w, bias=True)  # shared by all layers, zero at the start
        self.layers = nn.ModuleList(HeadLayer(config, mcore, tp_group, self.rope) for _ in range(m.head.num_layers))
        self.final_modulation = linear(mcore, w, 2 * w, bias=True)
        self.output = linear(mcore, w, outputs)  # zero at the start, like the prior
        self.prior = linear(mcore, m.hidden_size, outputs) if m.head.prior else None
        self.prior_last = linear(mcore, m.hidden_size, outputs) if m.head.prior and m.block_size > 1 else None
        setattr(self.position, PARTIAL, mcore.sequence_parallel)

    def features(
        self, x: Tensor, level: Tensor, hidden: Tensor, start: Tensor | None = None, noisy: NoisyPlace | None = None
    ) -> Tensor:
        """
        Args:
            x: [s, b, M, W], the tokens' input.
            level: what tells the M evaluations apart, [n, 1, b, M, W] or what broadcasts to it.
            hidden: [s, b, D], the backbone's states.
            start: int64 [b, S], the first position that attention across blocks may reach; None: as far as it goes.
            noisy: of the blocks that stand behind the sequence in all of these.

        Returns:
            [s, b, M, W], normalised.
        """
        s, b, m, w = x.shape
        context = self._both(self.condition, self.condition_last, hidden)  # [n, K, b, 1, W]
        condition = F.silu(level + context).view(s, b * m, w)
        x = (x + context.flatten(0, 1)).reshape(s, b * m, w) + self.position.repeat(s // self.block_size, 1)[:, None, :]
        modulation = self.modulation(condition).chunk(6, dim=-1)
        for layer in self.layers:
            x = layer(x, modulation, start, noisy)
        shift, gain = self.final_modulation(condition).chunk(2, dim=-1)
        return self.kernels.modulated_rms_norm(x, shift, gain, EPS).view(s, b, m, w)

    def prior_logits(self, hidden: Tensor) -> Tensor | float:
        """What the backbone alone says, [s, b, 1, outputs]: linear, and the same at every noise level."""
        if self.prior is None:
            return 0.0
        return self._both(self.prior, self.prior_last, hidden).flatten(0, 1)

    def _both(self, own: nn.Module, last: nn.Module | None, hidden: Tensor) -> Tensor:
        """own(row) + last(last row of the block): [s, b, D] to [n, K, b, 1, outputs]."""
        rows = own(hidden).unflatten(0, (-1, self.block_size)).unsqueeze(3)
        return rows if last is None else rows + last(hidden[self.block_size - 1 :: self.block_size])[:, None, :, None]


class Newest(NamedTuple):
    """The token before each block, which is decided when the block is begun."""

    index: Tensor  # int64 [n, b, G], values of its groups
    known: Tensor  # bool [n, b], whether there is one


class DenoisingHead(BlockHead):
    """Predicts of the noisy bits of a whole block what the matched filter and the prior lack."""

    def __init__(self, config: Config, mcore: Any, tp_group: Any, posterior: BitPosterior | GroupPosterior) -> None:
        super().__init__(config, mcore, tp_group, posterior.outputs)
        w = config.model.head.hidden_size
        self.input = linear(mcore, config.model.bits, w)
        self.estimate = linear(mcore, config.model.bits, w) if config.diffusion.self_condition else None
        self.values, self.pairs = None, None
        if isinstance(posterior, GroupPosterior):
            self.values = value_table(mcore, posterior.groups, w)
            self.pairs = make_pairs(config, mcore, posterior.groups, w)
        self.before = linear(mcore, w, w) if config.model.token_before else None  # of the name of the token before
        self.soft_prior = config.model.soft_prior
        self.posterior: BitPosterior | GroupPosterior = posterior
        self.levels = config.noise_levels
        self.noise_level = NoiseLevelEmbedding(mcore, w, self.levels)

    def forward(
        self,
        z: Tensor,
        log_sigma: Tensor,
        hidden: Tensor,
        shown: Tensor | None = None,
        projected: Tensor | None = None,
        newest: Newest | None = None,
    ) -> Tensor:
        """
        Args:
            z: float32 [s, b, M, B], noised bits x + sigma eps.
            log_sigma: float32 [n, b, M], one level a block, n = s / K; or [s, b, M, G], of each group of bits.
            hidden: [s, b, D], the backbone's states.
            shown: bool [n, b, M], which evaluations see the head's own estimate; None: all, if it takes one.
            projected: [s, b, M, W], z through the input layer, if that is done.
            newest: of the blocks, for a head with `token_before`.

        Returns:
            [s, b, M, outputs], what `posterior.logits` takes.
        """
        if self.estimate is None:
            return self.evaluate(z, log_sigma, hidden, None, projected, newest)
        with torch.no_grad():
            first = self.evaluate(z, log_sigma, hidden, None, projected, newest)
            logits = self.posterior.logits(first, z, self._sigma(log_sigma))
            estimate = self.posterior.mean(logits)
            if shown is not None:
                estimate = estimate * shown.repeat_interleave(self.block_size, dim=0)[..., None]
        return self.evaluate(z, log_sigma, hidden, estimate, projected, newest)

    def evaluate(
        self,
        z: Tensor,
        log_sigma: Tensor,
        hidden: Tensor,
        estimate: Tensor | None,
        projected: Tensor | None = None,
        newest: Newest | None = None,
    ) -> Tensor:
        """As `forward`, once; estimate: float32 [s, b, M, B] in [-1, 1] of the clean bits, 0 where nothing is known."""
        dtype, sigma = self.input.weight.dtype, self._sigma(log_sigma)
        x = self.input(network_input(z, sigma).to(dtype)) if projected is None else projected
        if estimate is not None:
            assert self.estimate is not None
            x = x + self.estimate(estimate.to(dtype))
        prior = self.prior_logits(hidden)
        if self.values is not None:
            name = self._likely_name(z, sigma, prior)
            x = x + name
            if self.before is not None:
                assert newest is not None
                x = x + self.before(self._behind(newest, name))
        return self.output(self.features(x, self._level(log_sigma), hidden)) + prior

    def _sigma(self, log_sigma: Tensor) -> Tensor:
        """Of the noise on every bit, [s, b, M, 1] or [s, b, M, B]; log_sigma as of `forward`."""
        if log_sigma.dim() == 3:
            return token_sigma(log_sigma, self.block_size)
        assert isinstance(self.posterior, GroupPosterior)
        return self.posterior.groups.spread(log_sigma.exp())

    def _level(self, log_sigma: Tensor) -> Tensor:
        """What the levels are, [n, K, b, M, W], or [n, 1, b, M, W] where the K tokens of a block have the same."""
        if log_sigma.dim() == 3:
            return self.noise_level(log_sigma[..., None].expand(*log_sigma.shape, self.levels))[:, None]
        return self.noise_level(log_sigma).unflatten(0, (-1, self.block_size))

    def _likely_name(self, z: Tensor, sigma: Tensor, prior: Tensor | float) -> Tensor:
        """The mean name of the tokens that the noisy bits allow, [s, b, M, W]."""
        assert isinstance(self.posterior, GroupPosterior) and self.values is not None
        weighed = prior if self.soft_prior and isinstance(prior, Tensor) else None
        likely = self.posterior.likely(z, sigma, weighed).to(self.values.dtype)
        name = likely.flatten(-2) @ self.values
        return name if self.pairs is None else name + self.pairs.expected(likely)

    def _behind(self, newest: Newest, name: Tensor) -> Tensor:
        """The name of the token before each, [s, b, M, W], from their own."""
        assert isinstance(self.posterior, GroupPosterior) and self.values is not None
        clean = name_of(self.values, self.pairs, newest.index, self.posterior.groups) * newest.known[..., None]
        blocks = name.unflatten(0, (-1, self.block_size))
        return torch.cat((clean[:, None, :, None].expand_as(blocks[:, :1]), blocks[:, :-1]), dim=1).flatten(0, 1)
