"""`model`: codes of tokens, the backbone, the head."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_bit.config.section import Section


class HeadConfig(Section):
    kind: Literal["diffusion", "chain", "softmax"] = "diffusion"
    """`diffusion` takes the noise off all bits of a block together. `chain` decides a block's tokens one after
    another, and a token's groups of bits (`model.group_bits`) one after another: the likelihood is exact, and of
    `diffusion` only `context_noise`, `condition_drop` and `noisy_every` (with the distribution of noise levels) have an
    effect, `evaluate.noise_samples` none in training. `softmax` is
    the autoregressive peer to compare with: a token table, and a softmax over the vocabulary, both untied and split
    over `parallel.tp`; it needs `model.block_size=1`, and what is said below of the head, of bits and of noise then
    has no effect."""
    window: int = Field(default=8, ge=1, le=2**20)
    """Tokens, its own among them, that a token of a chain head's attention reaches back to, also across blocks."""
    prior: bool = True
    """Add to the head's logits a linear map of the backbone's states, the same at every noise level."""
    prior_rank: int | None = Field(default=0, ge=0, le=2**20)
    """Of a `chain`: the prior of a group is told the groups before it, by a product of this rank with the backbone's
    states. 0: it is not, and cannot tie the groups of a token together. null: the width of the head where a token
    has several groups and the head a prior, else 0."""
    token_before: bool | None = False
    """Of `diffusion` over groups of bits: a token of a block also enters as what is known of the token before it, the
    first one of the newest token that is decided (a chain always has that). null: true where it can be."""
    soft_prior: bool | None = False
    """Of the same: what is known of a token is what its noisy bits and the prior say of its groups together, and not
    the noisy bits alone. null: true where it can be."""
    num_layers: int = Field(default=2, ge=1, le=4096)
    """Layers of the head, a light transformer over the K tokens of one block."""
    hidden_size: int = Field(default=256, ge=8, le=2**20)
    """Width of the head."""
    num_heads: int = Field(default=4, ge=1, le=2**16)
    """Attention heads of the head; divisible by `parallel.tp`."""
    ffn_hidden_size: int = Field(default=640, ge=8, le=2**22)
    """SwiGLU width of the head; divisible by `parallel.tp`."""

    @model_validator(mode="after")
    def _check(self) -> HeadConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} has to be a multiple of num_heads {self.num_heads}")
        if self.kind == "chain" and (self.hidden_size // self.num_heads) % 2:
            raise ValueError(f"hidden_size / num_heads = {self.hidden_size // self.num_heads} has to be even for RoPE")
        return self


class MemoryConfig(Section):
    """Embeddings of the newest tokens together: of every n-gram, hashed, in tables of fixed size."""

    rows: int = Field(default=0, ge=0, le=2**32)
    """Rows of each table; there is one for each order and hash, at the backbone's input, and of a `chain` also in the
    head, keyed by the tokens before and, inside a token, by the groups before. 0: no memory. A row costs weights and
    optimizer state and no FLOPs. 16,384 was tried (docs/quality.md)."""
    orders: tuple[int, ...] = (2, 3)
    """Lengths of the n-grams, in tokens: from 1 to 8, each once. Order 1 is the newest token alone."""
    hashes: int = Field(default=1, ge=1, le=8)
    """Rows that an n-gram has, each in a table of its own, against collisions."""

    @model_validator(mode="after")
    def _check(self) -> MemoryConfig:
        if not self.orders or len({*self.orders}) < len(self.orders) or not {*self.orders} <= {*range(1, 9)}:
            raise ValueError(f"orders {list(self.orders)} have to be one or more of the lengths 1 to 8, each once")
        return self

    @property
    def tables(self) -> int:
        """Tables, and rows that are looked up for one token, T."""
        return len(self.orders) * self.hashes

    @property
    def total_rows(self) -> int:
        """Of all tables."""
        return self.tables * self.rows


class ModelConfig(Section):
    bits: int = Field(default=16, ge=1, le=256)
    """Bits of one token, B, at most 62 of tokens with an id. The vocabulary of the data has to fit: V <= 2^B. `auto`
    takes the fewest that the data in `data.path` needs, and 16 where none is named; `auto 12` takes 12 there."""
    code: Literal["binary", "gray", "random", "semantic", "raw"] = "binary"
    """How a token id becomes bits: the id itself, its Gray code, a seeded permutation (the negative control), or a code
    learned from the text of `data.path` (`megatron-bit codes DATA`), which makes bits cheaper to decide apart. `raw`:
    tokens are records of B bits (`prepare --raw-bits B`), which have neither ids nor a vocabulary."""
    group_bits: int = Field(default=1, ge=1, le=10)
    """Bits decided together, g: the groups of a token's bits are as even as they can be, and have 2^g values. 1: every
    bit by itself; B: a softmax over all codes. Above 1 bits enter the model as embeddings of their groups' values."""
    names: Literal["auto", "sum", "pairs"] = "sum"
    """What a token is called where it enters the backbone and the head: the `sum` of the embeddings of its groups'
    values, which cannot tell all tokens apart; `pairs` adds the products of a second set over all pairs of groups,
    through a linear map. Tables of fixed size, whatever the vocabulary. `auto`: pairs where a token has several groups
    of several bits, else sum."""
    vocab_size: int | None = Field(default=None, ge=1)
    """Tokens of the vocabulary, V. The data says it, and has to agree if it is set; a softmax head planned without
    data (`--dry-run`) needs it."""
    block_size: int = Field(default=4, ge=1, le=64)
    """Tokens generated at once, K."""
    attention: Literal["causal", "block_causal"] = "causal"
    """Inside a block of the backbone: causal (the state of a block's first token has seen only the first token of
    the block before; the head, which sees all K states, makes up for it), or every token sees its whole block."""
    num_layers: int = Field(default=6, ge=1, le=4096)
    """Layers of the backbone."""
    hidden_size: int = Field(default=256, ge=8, le=2**20)
    """Width of the backbone, D."""
    num_heads: int = Field(default=4, ge=1, le=2**16)
    """Query heads; divisible by `parallel.tp`."""
    num_kv_heads: int = Field(default=2, ge=1, le=2**16)
    """Key/value heads (grouped-query attention); divisible by `parallel.tp`."""
    head_dim: int | None = Field(default=None, ge=2, le=2**16)
    """Width of an attention head of the backbone; without one `hidden_size` / `num_heads`."""
    ffn_hidden_size: int = Field(default=640, ge=8, le=2**22)
    """SwiGLU width; divisible by `parallel.tp`."""
    qk_norm: bool = True
    """RMSNorm on queries and keys."""
    rope_base: float = Field(default=10_000.0, gt=1)
    """Base of the rotary position embedding."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of the RMSNorms with a learned scale."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""
    head: HeadConfig = HeadConfig()
    memory: MemoryConfig = MemoryConfig()

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.code == "raw":
            if self.head.kind == "softmax" or self.vocab_size is not None:
                what = "head.kind softmax" if self.head.kind == "softmax" else f"vocab_size {self.vocab_size}"
                raise ValueError(f"{what} needs a vocabulary, and code raw has none; leave out one of the two")
        elif self.bits > 62:
            raise ValueError(f"bits {self.bits} is more than the 62 of a token id; only code=raw has up to 256")
        if self.group_bits > self.bits:
            raise ValueError(f"group_bits {self.group_bits} is more than the bits {self.bits} of a token")
        if self.names == "pairs" and not self._several:
            raise ValueError(
                f"names pairs needs several groups of several bits, and group_bits {self.group_bits} makes "
                f"{len(self.group_sizes)} of {self.bits} bits; leave it at sum, or at auto"
            )
        if self.head.prior_rank and not self._ties:
            raise ValueError(
                f"head.prior_rank {self.head.prior_rank} needs head.kind chain with head.prior and several groups of "
                f"several bits; leave it at 0, or at null"
            )
        if self.head.token_before and not self.denoises_groups:
            raise ValueError(
                f"head.token_before true needs head.kind diffusion and group_bits above 1, and they are "
                f"{self.head.kind} and {self.group_bits}; leave it at false, or at null"
            )
        if self.head.soft_prior and not (self.denoises_groups and self.head.prior):
            raise ValueError(
                f"head.soft_prior true needs head.kind diffusion with head.prior and group_bits above 1, and they are "
                f"{self.head.kind}, {str(self.head.prior).lower()} and {self.group_bits}; leave it at false, or at null"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} has to be a multiple of num_heads {self.num_heads}, or head_dim be set"
            )
        if self.attention_head_dim % 2:
            name = "hidden_size / num_heads =" if self.head_dim is None else "head_dim"
            raise ValueError(f"{name} {self.attention_head_dim} has to be even for RoPE")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} has to be a multiple of num_kv_heads {self.num_kv_heads}")
        return self

    @property
    def _several(self) -> bool:
        return self.group_bits > 1 and len(self.group_sizes) > 1

    @property
    def _ties(self) -> bool:
        return self._several and self.head.kind == "chain" and self.head.prior

    @property
    def denoises_groups(self) -> bool:
        """Whether a diffusion head has groups of several bits, and so names of likely values."""
        return self.head.kind == "diffusion" and self.group_bits > 1

    @property
    def token_before(self) -> bool:
        """`head.token_before`, resolved."""
        return self.denoises_groups if self.head.token_before is None else self.head.token_before

    @property
    def soft_prior(self) -> bool:
        """`head.soft_prior`, resolved."""
        return self.denoises_groups and self.head.prior if self.head.soft_prior is None else self.head.soft_prior

    @property
    def pairs(self) -> bool:
        """Whether `names`, resolved, are pairs."""
        return self.names == "pairs" or (self.names == "auto" and self._several)

    @property
    def prior_rank(self) -> int:
        """`head.prior_rank`, resolved."""
        if self.head.prior_rank is None:
            return self.head.hidden_size if self._ties else 0
        return self.head.prior_rank

    @property
    def attention_head_dim(self) -> int:
        """`head_dim`, resolved."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def query_width(self) -> int:
        """Channels of all query heads, and of what they attend to."""
        return self.num_heads * self.attention_head_dim

    @property
    def kv_width(self) -> int:
        """Channels of all key heads, and of all value heads."""
        return self.num_kv_heads * self.attention_head_dim

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Bits of each group, the larger ones first: 12 bits by 8 are (6, 6), 15 by 8 are (8, 7)."""
        count = -(-self.bits // self.group_bits)
        size, larger = divmod(self.bits, count)
        return (size + 1,) * larger + (size,) * (count - larger)

    @property
    def group_values(self) -> int:
        """Values of all groups together, G * U, with room for the largest group's in each: rows of their tables."""
        return len(self.group_sizes) * 2 ** self.group_sizes[0]

    @property
    def head_outputs(self) -> int:
        """Outputs of the head for one token: a logit for every value of every group, or for every single bit."""
        return self.bits if self.group_bits == 1 and self.head.kind == "diffusion" else self.group_values

    @property
    def padded_vocab_size(self) -> int:
        """Rows of a softmax model's token table and projection: a function of V alone, so that any layout has them."""
        assert self.vocab_size is not None, "the vocabulary is not known yet"
        return -(-self.vocab_size // 128) * 128
