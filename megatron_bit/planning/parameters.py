"""Parameters of a configuration's model, counted without building it. Imports no torch."""

from __future__ import annotations

from megatron_bit.config import Config
from megatron_bit.parallel.split import FREQUENCIES


def parameter_counts(config: Config) -> dict[str, int]:
    """Parameters of the unsharded model, by part. A test holds them against the built model."""
    m, h = config.model, config.model.head
    d, w = m.hidden_size, h.hidden_size
    attention = 2 * d * (m.query_width + m.kv_width) + (2 * m.attention_head_dim if m.qk_norm else 0)
    layer = attention + 3 * d * m.ffn_hidden_size + 2 * d
    if h.kind == "softmax":
        table, (remembered, _) = m.padded_vocab_size * d, memory_parameters(config)
        return {"embedding": table + remembered, "backbone": m.num_layers * layer + d, "head": table}
    rows = 1 + (m.block_size > 1)  # a token's own state, and the last of its block
    head = h.num_layers * (4 * w * w + 3 * w * h.ffn_hidden_size) + m.block_size * w + rows * d * w
    head += w * 6 * w + 6 * w + w * 2 * w + 2 * w  # modulation
    head += (w + rows * d * h.prior) * m.head_outputs
    if h.kind == "chain":
        head += 2 * m.group_values * w + len(m.group_sizes) * w + m.prior_rank * (2 * m.group_values + rows * d)
        if config.noisy_every:
            head += FREQUENCIES * w + w * w + 2 * len(m.group_sizes) * w
    else:
        head += m.bits * w * (2 if config.diffusion.self_condition else 1)
        head += config.noise_levels * FREQUENCIES * w + w + w * w + w + (m.group_values * w if m.group_bits > 1 else 0)
        head += w * w * m.token_before
    read = m.group_values * d if m.group_bits > 1 else m.bits * d + d * d
    if m.pairs:
        read += 2 * m.group_values * d + 2 * d * d
        head += 2 * m.group_values * w + 2 * w * w
    input_memory, head_memory = memory_parameters(config)
    embedding = m.block_size * d + read + d + input_memory
    return {"embedding": embedding, "backbone": m.num_layers * layer + d, "head": head + head_memory}


def memory_parameters(config: Config) -> tuple[int, int]:
    """Of the tables of `model.memory`, at the input and in the head."""
    m = config.model
    places = (1 + (len(m.group_sizes) > 1)) * (m.head.kind == "chain")  # before a token, and inside it
    return m.memory.total_rows * m.hidden_size, m.memory.total_rows * m.head.hidden_size * places


def table_parameters(config: Config) -> int:
    """Of these, rows for tokens, for values of groups and of the memory, and the projections onto them: what is called
    embeddings."""
    m, h = config.model, config.model.head
    d, w, remembered = m.hidden_size, h.hidden_size, sum(memory_parameters(config))
    if h.kind == "softmax":
        return 2 * m.padded_vocab_size * d + remembered
    if h.kind == "diffusion" and m.group_bits == 1:
        return remembered
    projections = (w + (1 + (m.block_size > 1)) * d * h.prior) * m.head_outputs
    tables = (m.group_bits > 1) * d + (2 if h.kind == "chain" else 1) * w + 2 * m.prior_rank
    return remembered + projections + m.group_values * (tables + (2 * (d + w) if m.pairs else 0))


def local_parameters(config: Config, tp: int) -> dict[str, float]:
    """Parameters that one tensor-parallel rank holds: of the embedding, of one layer, of the last norm, of the head.

    Split over TP are the matrices of layers (of backbone and head), the memory and a softmax model's tables; the rest
    is whole.
    """
    m, h = config.model, config.model.head
    counts = parameter_counts(config)
    norms = 2 * m.hidden_size + (2 * m.attention_head_dim if m.qk_norm else 0)
    layer = (counts["backbone"] - m.hidden_size) // m.num_layers
    embedding, head = counts["embedding"], counts["head"]
    remembered, split = memory_parameters(config)
    split += h.num_layers * (4 * h.hidden_size**2 + 3 * h.hidden_size * h.ffn_hidden_size)
    if h.kind == "softmax":
        remembered, split = embedding, head
    return {
        "embedding": embedding - remembered + remembered / tp,
        "layer": norms + (layer - norms) / tp,
        "norm": m.hidden_size,
        "head": head - split + split / tp,
    }
