"""Sizes of a BitLM, as `config.json` has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

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
