"""The tensors of a Hugging Face folder: which logical tensor each one is, or which rows of it. Read in both directions.

Llama and Qwen3 write a layer as we do: RMSNorm, grouped queries, RoPE that turns channel i with i + d/2, SwiGLU. Only
the projections of queries, keys and values are one tensor with us.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megatron_bit.config import Config, ModelConfig
from megatron_bit.parallel.split import FREQUENCIES


@dataclass(frozen=True)
class FusedRows:
    """Of a matrix whose rows are [group, place in the group, row], all rows at the places `taken`."""

    groups: int
    places: int
    rows: int  # of a place
    taken: slice

    def cut(self, whole: Tensor) -> Tensor:
        """These rows of the whole matrix, [rows, columns]."""
        return whole.unflatten(0, (self.groups, self.places, self.rows))[:, self.taken].reshape(-1, whole.shape[1])

    def find(self, row: int) -> tuple[int, int] | None:
        """Where a row of the whole matrix is among these, and how many there follow each other in both; or None."""
        group, inside = divmod(row, self.places * self.rows)
        begin, end = self.taken.start * self.rows, self.taken.stop * self.rows
        if not begin <= inside < end:
            return None
        return group * (end - begin) + inside - begin, end - inside


@dataclass(frozen=True)
class Part:
    """One tensor of the folder: a logical tensor, the first rows of it (without padding), or its `fused` rows."""

    name: str
    shape: tuple[int, ...]
    logical: str
    logical_shape: tuple[int, ...]
    fused: FusedRows | None = None

    def cut(self, whole: Tensor) -> Tensor:
        """Of the logical tensor, what this one is."""
        return self.fused.cut(whole) if self.fused is not None else whole[: self.shape[0]]

    def find(self, row: int) -> tuple[int, int] | None:
        """Where a row of the logical tensor is in this one, and how many there follow each other in both; or None."""
        if self.fused is not None:
            return self.fused.find(row)
        return (row, self.shape[0] - row) if row < self.shape[0] else None


def parts(config: Config) -> Iterator[Part]:
    """All weights of the model, a layer's side by side. A softmax model's vocabulary has to be known."""
    m = config.model
    d, softmax = m.hidden_size, m.head.kind == "softmax"
    if softmax:
        yield _tokens(m, "model.embed_tokens.weight", "embedding.table.weight")
    else:
        yield _same("model.embed_tokens.start", "embedding.start", m.block_size, d)
        if m.group_bits > 1:
            yield _same("model.embed_tokens.values", "embedding.values", m.group_values, d)
            if m.pairs:
                yield from _pairs("model.embed_tokens.pairs.", "embedding.pairs.", m.group_values, d)
        else:
            yield _same("model.embed_tokens.fc1.weight", "embedding.fc1.weight", d, m.bits)
            yield _same("model.embed_tokens.fc2.weight", "embedding.fc2.weight", d, d)
        yield _same("model.embed_tokens.norm.weight", "embedding.norm.weight", d)
    if m.memory.rows:
        yield _same("model.embed_tokens.memory.table", "embedding.memory.table", m.memory.total_rows, d)
    for i in range(m.num_layers):
        yield from _backbone_layer(m, f"model.layers.{i}.", f"backbone.layers.{i}.")
    yield _same("model.norm.weight", "backbone.final_layernorm.weight", d)
    if softmax:
        yield _tokens(m, "lm_head.weight", "head.logits.weight")
    else:
        yield from _block_head(config)


def _same(name: str, logical: str, *shape: int) -> Part:
    return Part(name, shape, logical, shape)


def _pairs(name: str, logical: str, values: int, width: int) -> Iterator[Part]:
    yield _same(f"{name}factors", f"{logical}factors", values, 2 * width)
    yield _same(f"{name}mix.weight", f"{logical}mix.weight", width, 2 * width)


def _tokens(m: ModelConfig, name: str, logical: str) -> Part:
    """A matrix with a row for each token, without the padding."""
    assert m.vocab_size is not None
    size, d = m.vocab_size, m.hidden_size
    return Part(name, (size, d), logical, (m.padded_vocab_size, d))


def _block_head(config: Config) -> Iterator[Part]:
    m, diffusion = config.model, config.diffusion
    same, d, h, w = _same, m.hidden_size, m.head, m.head.hidden_size
    ends = ("", "_last") if m.block_size > 1 else ("",)  # of a token's own state, of the last in its block
    yield same("head.position", "head.position", m.block_size, w)
    for end in ends:
        yield same(f"head.condition{end}_proj.weight", f"head.condition{end}.weight", w, d)
        if h.prior:
            yield same(f"head.prior{end}_proj.weight", f"head.prior{end}.weight", m.head_outputs, d)
    if h.kind == "chain":
        yield same("head.previous", "head.previous", m.group_values, w)
        yield same("head.stages", "head.stage", len(m.group_sizes), w)
        if config.noisy_every:
            for fc, inputs in (("fc1", FREQUENCIES), ("fc2", w)):
                yield same(f"head.seen_levels.{fc}.weight", f"head.seen_levels.{fc}.weight", w, inputs)
            yield same("head.seen_levels.slots", "head.seen_levels.slots", 2 * len(m.group_sizes), w)
        if rank := m.prior_rank:
            yield same("head.told", "head.told", m.group_values, rank)
            for end in ends:
                yield same(f"head.tie{end}_proj.weight", f"head.tie{end}.weight", rank, d)
            yield same("head.tied", "head.tied", m.group_values, rank)
        if m.memory.rows:
            for place in ("memory", "inner_memory")[: len(m.group_sizes)]:
                yield same(f"head.{place}.table", f"head.{place}.table", m.memory.total_rows, w)
    else:
        yield same("head.in_proj.weight", "head.input.weight", w, m.bits)
        if diffusion.self_condition:
            yield same("head.estimate_proj.weight", "head.estimate.weight", w, m.bits)
        if m.token_before:
            yield same("head.before_proj.weight", "head.before.weight", w, w)
        for fc, inputs in (("fc1", config.noise_levels * FREQUENCIES), ("fc2", w)):
            yield same(f"head.noise_embed.{fc}.weight", f"head.noise_level.{fc}.weight", w, inputs)
            yield same(f"head.noise_embed.{fc}.bias", f"head.noise_level.{fc}.bias", w)
    if h.kind == "chain" or m.group_bits > 1:
        yield same("head.values", "head.values", m.group_values, w)
    if m.pairs:
        yield from _pairs("head.pairs.", "head.pairs.", m.group_values, w)
    for name, count in (("modulation", 6), ("final_modulation", 2)):
        yield same(f"head.{name}.weight", f"head.{name}.weight", count * w, w)
        yield same(f"head.{name}.bias", f"head.{name}.bias", count * w)
    yield same("head.out_proj.weight", "head.output.weight", m.head_outputs, w)
    for i in range(h.num_layers):
        layer = f"head.layers.{i}."
        for j, letter in enumerate("qkv"):  # the rows go head by head: query, key, value
            rows = FusedRows(h.num_heads, 3, w // h.num_heads, slice(j, j + 1))
            yield Part(f"{layer}self_attn.{letter}_proj.weight", (w, w), f"{layer}qkv.weight", (3 * w, w), rows)
        yield same(f"{layer}self_attn.o_proj.weight", f"{layer}proj.weight", w, w)
        yield same(f"{layer}mlp.gate_proj.weight", f"{layer}fc1.gate.weight", h.ffn_hidden_size, w)
        yield same(f"{layer}mlp.up_proj.weight", f"{layer}fc1.up.weight", h.ffn_hidden_size, w)
        yield same(f"{layer}mlp.down_proj.weight", f"{layer}fc2.weight", w, h.ffn_hidden_size)


def _backbone_layer(m: ModelConfig, to: str, logical: str) -> Iterator[Part]:
    d, f, head_dim = m.hidden_size, m.ffn_hidden_size, m.attention_head_dim
    queries = m.num_heads // m.num_kv_heads  # of one group
    fused = ((m.num_heads + 2 * m.num_kv_heads) * head_dim, d)
    # the rows go group by group: the group's query heads, its key head, its value head
    cuts = {"q": slice(0, queries), "k": slice(queries, queries + 1), "v": slice(queries + 1, queries + 2)}
    yield Part(f"{to}input_layernorm.weight", (d,), f"{logical}input_layernorm.weight", (d,))
    for letter, rows in cuts.items():
        shape = (m.num_kv_heads * (rows.stop - rows.start) * head_dim, d)
        taken = FusedRows(m.num_kv_heads, queries + 2, head_dim, rows)
        yield Part(
            f"{to}self_attn.{letter}_proj.weight", shape, f"{logical}self_attention.linear_qkv.weight", fused, taken
        )
    same = [("self_attn.o_proj", "self_attention.linear_proj", (d, m.query_width))]
    if m.qk_norm:
        same += [(f"self_attn.{x}_norm", f"self_attention.{x}_layernorm", (head_dim,)) for x in "qk"]
    same += [
        ("post_attention_layernorm", "pre_mlp_layernorm", (d,)),
        ("mlp.gate_proj", "mlp.linear_fc1.gate", (f, d)),
        ("mlp.up_proj", "mlp.linear_fc1.up", (f, d)),
        ("mlp.down_proj", "mlp.linear_fc2", (d, f)),
    ]
    for name, old, shape in same:
        yield Part(f"{to}{name}.weight", shape, f"{logical}{old}.weight", shape)


def logical_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every logical tensor of the model and its shape, layer by layer. The vocabulary has to be known."""
    return {part.logical: part.logical_shape for part in parts(config)}
