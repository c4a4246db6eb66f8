"""The backbone: causal over blocks, with a cache of a fixed size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .bits_bitlm import group_values, table_rows, unpack
from .configuration_bitlm import BitLMConfig
from .embedding_bitlm import begun_keys, make_memory, make_pairs, name_of


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
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        if cache is not None and slots is not None:
            k = cache.keys[self.layer].index_copy_(2, slots, k)
            v = cache.values[self.layer].index_copy_(2, slots, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
        return self.o_proj(out.transpose(1, 2).flatten(2))


def rope(position: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `rotate` multiplies with, [b, s, 1, d], for positions int64 [b, s]."""
    half = head_dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=position.device) / half
    angle = (position.double()[..., None] * theta**-exponent)[:, :, None, :]
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
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
            self.values = nn.Parameter(torch.zeros(table_rows(config), config.hidden_size))
            self.pairs = make_pairs(config, config.hidden_size)
        else:
            self.fc1 = nn.Linear(config.bits, config.hidden_size, bias=False)
            self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.memory = make_memory(config, config.hidden_size)
        self.norm = BitLMRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, bits: Tensor, position_ids: Tensor, before: Tensor | None = None) -> Tensor:
        """bits int8 [b, s, B], of the tokens at the input positions [b, s]; before: those of the tokens before these,
        [b, R, B], for a memory."""
        if self.grouped:
            x = name_of(self.values, self.pairs, group_values(self.config, bits))
        else:
            x = self.fc2(F.silu(self.fc1(bits.to(self.fc1.weight.dtype))))
        k = self.start.shape[0]
        if self.memory is not None:
            whole = bits if before is None else torch.cat((before, bits), dim=1)
            whole = F.pad(whole, (0, 0, max(self.memory.orders), 0))  # what is not known is not looked at
            x = x + self.memory(begun_keys(group_values(self.config, whole))[..., -1], position_ids - k + 1)
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
        cos, sin = rope(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
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
