"""How many backbone layers each pipeline chunk gets, with the head's cost counted. Imports no torch."""

from __future__ import annotations

from megatron_bit.config import Config


def layer_flops(config: Config) -> float:
    """Forward FLOPs of one backbone layer for one token (multiply-adds count twice; causal attention half)."""
    m, s = config.model, config.data.seq_length
    projections = m.hidden_size * (2 * m.query_width + 2 * m.kv_width)
    return 2.0 * (projections + 3 * m.hidden_size * m.ffn_hidden_size) + 2.0 * s * m.query_width


def head_flops(config: Config) -> float:
    """Forward FLOPs of the head for one token: all its noise samples or stages, and what they share.

    Of a softmax head: the projection onto the padded vocabulary, which the configuration has to know.
    """
    m, h, n = config.model, config.model.head, config.head_evaluations
    if h.kind == "softmax":
        return 2.0 * m.hidden_size * m.padded_vocab_size
    w, outputs, rows = h.hidden_size, m.head_outputs, 1.0 + (m.block_size > 1) / m.block_size
    keys = 2 * h.window if h.kind == "chain" else m.block_size
    layer = 2.0 * (4 * w * w + 3 * w * h.ffn_hidden_size) + 4.0 * keys * w
    each = h.num_layers * layer + 2.0 * 8 * w * w
    if h.kind == "chain":
        each += 2.0 * w * outputs / len(m.group_sizes)  # a stage decides its own group
    else:
        level, a = 2.0 * (config.noise_levels * FREQUENCIES * w + w * w), config.diffusion.levels_apart / n
        each += level * (a + (1 - a) / m.block_size) + 2.0 * w * (m.bits + outputs)  # one level a block, or a group
        if m.group_bits > 1:
            each += 2.0 * outputs * w + 4.0 * outputs * m.group_sizes[0]  # embedding of likely values; evidence, mean
            each += 2.0 * w * w * m.token_before
    once = 2.0 * m.hidden_size * rows * (w + outputs * h.prior + m.prior_rank) + 2.0 * outputs * m.prior_rank
    if share := config.noisy_share:  # what is likely of each group, names of it, and what is told of its noise
        seen = 2.0 * outputs * (2 * w + 2 * m.prior_rank + m.group_sizes[0])
        seen += 2.0 * (len(m.group_sizes) * (FREQUENCIES + w) * w + m.hidden_size * rows * (w + m.prior_rank))
        each, once = each * (1.0 + share), once + share * (seen + (4.0 * (w + outputs) * w if m.pairs else 0.0))
    if m.pairs:  # a chain names the token before once, joint diffusion each evaluation's likely values
        mix = 4.0 * w * w
        once, each = (once + mix, each) if h.kind == "chain" else (once, each + mix + 4.0 * outputs * w)
    return n * each + once


def noisy_blocks(every: int, blocks: int, shards: int) -> int:
    """Blocks that each of the ranks which share a sequence has once more where one in `every` is noisy; also those that
    have fewer of them in their part."""
    part = blocks // shards
    return max(-(-(r + 1) * part // every) - r * part // every for r in range(shards))


def embedding_flops(config: Config) -> float:
    """Forward FLOPs of bits -> MLP -> width for one token; to look a token up in a table costs none."""
    m = config.model
    if m.head.kind == "softmax":
        return 0.0
    if m.group_bits > 1:
        return 4.0 * m.hidden_size**2 * m.pairs
    return 2.0 * (m.bits * m.hidden_size + m.hidden_size * m.hidden_size)


def train_flops(config: Config) -> float:
    """FLOPs of forward and backward (twice the forward) for one token; recomputation is not counted, as in MFU."""
    m, h = config.model, config.model.head
    layers, head = m.num_layers * layer_flops(config), head_passes(config) * head_flops(config)
    constant = 0.0  # products of what needs no gradient: the values that noisy bits allow
    if share := config.noisy_share:  # and what the noisy bits of a chain's say by themselves
        constant = share * 2.0 * m.head_outputs * m.group_sizes[0]
        if not h.prior:
            constant += share * 2.0 * m.head_outputs * h.hidden_size * (4 if m.pairs else 2)
    if m.denoises_groups and not m.soft_prior:
        constant = config.head_evaluations * 2.0 * m.head_outputs * h.hidden_size * (3 if m.pairs else 1)
    return 3.0 * (layers + head + embedding_flops(config)) - constant


def head_passes(config: Config) -> float:
    """Work of the head in training, in forward and backward passes: a forward pass more makes the first estimate."""
    return 4.0 / 3.0 if config.diffusion.self_condition else 1.0


FREQUENCIES = 128  # sinusoidal features of the noise level


def least_layers(config: Config) -> int:
    """Layers that the last chunk has at least."""
    return 1 if config.model.head.kind == "softmax" else 0


def split_layers(config: Config, num_chunks: int) -> list[int]:
    """Layers of each chunk, in pipeline order; the slowest chunk is as fast as it can be.

    The last chunk also carries the head and the first the embedding. Among the splits with the same slowest
    chunk, the more even one wins. Only the last chunk may be without layers (the head is its work), and not even that
    under a softmax head: one matrix cannot be cut into the optimizer's four groups (optim/groups.py).
    """
    layer, embedding = layer_flops(config), embedding_flops(config)
    head = head_passes(config) * head_flops(config)
    total = config.model.num_layers
    if num_chunks == 1:
        return [total]

    def cost(chunk: int, layers: int) -> float:
        extra = (embedding if chunk == 0 else 0.0) + (head if chunk == num_chunks - 1 else 0.0)
        return layers * layer + extra

    counts = [1] * (num_chunks - 1) + [least_layers(config)]
    for _ in range(total - sum(counts)):  # greedy is optimal here: every layer costs the same
        cheapest = min(range(num_chunks), key=lambda c: (cost(c, counts[c] + 1), c))
        counts[cheapest] += 1
    return counts
