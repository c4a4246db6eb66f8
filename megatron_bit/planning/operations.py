"""The work of a forward pass on one rank: matrix products with their sizes, and bytes of everything else.

A test holds the products to the FLOP counts of `parallel/split.py`, which are held to torch's counter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_bit.config import Config
from megatron_bit.parallel.dims import ParallelDims
from megatron_bit.parallel.split import FREQUENCIES, head_passes
from megatron_bit.planning.memory import head_activations

HEAD_TRAFFIC = 2.0  # times that a tensor which the head keeps is read or written in a forward pass: an assumption


class Product(NamedTuple):
    """[rows, inner] x [inner, columns], `count` times."""

    rows: float
    columns: float
    inner: float
    count: float = 1.0

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.columns * self.inner * self.count

    @property
    def elements(self) -> float:
        """Read and written."""
        return self.count * (self.rows * self.inner + self.inner * self.columns + self.rows * self.columns)


@dataclass
class Work:
    """Forward work of one micro-batch on one rank."""

    products: list[Product] = field(default_factory=list)
    attention_flops: float = 0.0
    elements: float = 0.0  # read and written outside of products, in the activations' width
    collectives: int = 0  # all-gathers and reduce-scatters over TP; an all-reduce is one of each
    collective_elements: float = 0.0  # of the whole tensor, in each

    @property
    def flops(self) -> float:
        return sum(product.flops for product in self.products) + self.attention_flops


def layer_work(config: Config, dims: ParallelDims) -> Work:
    """One layer of the backbone."""
    m, tp, tokens = config.model, dims.tp, config.train.micro_batch_size * config.data.seq_length
    d, f, q, kv = m.hidden_size, m.ffn_hidden_size, m.query_width, m.kv_width
    shared = tp if dims.sequence_parallel else 1
    outside = 10 * d / shared  # two norms (in, out) and two residual sums (in, in, out)
    inside = (q + kv) * (4 if m.qk_norm else 2) / tp + 3 * f / tp  # norm and RoPE of queries and keys, SwiGLU
    return Work(
        [
            Product(tokens, (q + 2 * kv) / tp, d),
            Product(tokens, d, q / tp),
            Product(tokens, 2 * f / tp, d),
            Product(tokens, d, f / tp),
        ],
        attention_flops=2.0 * tokens * config.data.seq_length * q / tp,  # causal: half of the scores
        elements=tokens * (outside + inside),
        collectives=4 if tp > 1 else 0,
        collective_elements=tokens * d,
    )


def embedding_work(config: Config, dims: ParallelDims) -> Work:
    """Bits to hidden states, through an MLP or a table; replicated over TP, split by the sequence under SP. A token
    table and a memory are split over TP: each rank looks up of the whole sequence what it has."""
    m, tokens = config.model, config.train.micro_batch_size * config.data.seq_length
    rows = tokens / (dims.tp if dims.sequence_parallel else 1)
    work = Work(elements=4 * rows * m.hidden_size + _remembered(config) * tokens * m.hidden_size)
    if dims.tp > 1:
        work.collectives = (m.head.kind == "softmax") + (m.memory.rows > 0)
        work.collective_elements = tokens * m.hidden_size
    if m.head.kind != "softmax" and m.group_bits == 1:
        work.products = [Product(rows, m.hidden_size, m.bits), Product(rows, m.hidden_size, m.hidden_size)]
    if m.head.kind != "softmax" and m.pairs:
        work.products = [Product(rows, m.hidden_size, 2 * m.hidden_size)]
    return work


def _remembered(config: Config) -> float:
    """Elements read and written to look up a token's n-grams, for each channel: rows, masked rows, their sum."""
    return 4.0 * config.model.memory.tables + 1.0 if config.model.memory.rows else 0.0


def head_work(config: Config, dims: ParallelDims) -> Work:
    """All evaluations of the head, and what they share."""
    m, h, tp = config.model, config.model.head, dims.tp
    width = 4 if config.train.precision == "fp32" else 2
    tokens = config.train.micro_batch_size * config.data.seq_length
    elements = HEAD_TRAFFIC * tokens * head_activations(config, dims, width)
    if h.kind == "softmax":
        work = Work([Product(tokens, m.padded_vocab_size / tp, m.hidden_size)], elements=elements)
        work.collectives, work.collective_elements = (1 if tp > 1 else 0), tokens * m.hidden_size
        return work
    w, outputs, own = h.hidden_size, m.head_outputs, tokens / (tp if dims.sequence_parallel else 1)
    again = 1.0 + config.noisy_share  # with the blocks that a chain evaluates once more
    rows, mine = tokens * config.head_evaluations * again, own * config.head_evaluations * again
    n, groups = h.num_layers, len(m.group_sizes)
    last = own / m.block_size if m.block_size > 1 else 0.0  # the last row of each block is a second condition
    products = [
        Product(rows, 3 * w / tp, w, n),
        Product(rows, w, w / tp, n),
        Product(rows, 2 * h.ffn_hidden_size / tp, w, n),
        Product(rows, w, h.ffn_hidden_size / tp, n),
        Product(mine, 8 * w, w),  # modulation of the layers, and of the output
        Product(own + last, w, m.hidden_size),
        Product(own + last, outputs * h.prior, m.hidden_size),
    ]
    if h.kind == "chain":  # a stage decides its own group
        products.append(Product(own * again, outputs / groups, w, groups))
        if m.prior_rank:
            products.append(Product((own + last) * again, m.prior_rank, m.hidden_size))
            products.append(Product(own * again, outputs / groups, m.prior_rank, groups))
        if m.pairs:
            products.append(Product(own * again, w, 2 * w))
        if noisy := own * config.noisy_share:  # evidence; embeddings of what is likely; what is told of the noise
            products += [Product(noisy, outputs, m.group_sizes[0]), Product(noisy, 2 * w + m.prior_rank, outputs)]
            products += [Product(noisy * groups, w, FREQUENCIES), Product(noisy * groups, w, w)]
            products.append(Product((own + last) * config.noisy_share, w, m.hidden_size))
            products += [Product(noisy, 2 * w, outputs)] if m.pairs else []
    else:
        apart = config.diffusion.levels_apart / config.head_evaluations
        levels = mine * (apart + (1 - apart) / m.block_size)  # one noise level a block, or one a group
        products += [Product(levels, w, config.noise_levels * FREQUENCIES), Product(levels, w, w)]
        products += [Product(mine, w, m.bits), Product(mine, outputs, w)]
        if m.group_bits > 1:  # embedding of likely values; evidence, mean
            products += [Product(mine, w, outputs), Product(mine, outputs, m.group_sizes[0], 2)]
        if m.token_before:
            products.append(Product(mine, w, w))
        if m.pairs:
            products += [Product(mine, w, 2 * w), Product(mine, 2 * w, outputs)]
    keys = 2 * h.window if h.kind == "chain" else m.block_size
    remembers = h.kind == "chain" and m.memory.rows > 0  # before each token, and inside it before each group but one
    elements = elements * head_passes(config) + remembers * _remembered(config) * rows * w
    return Work(
        products,
        attention_flops=4.0 * rows * keys * w * n / tp,
        elements=elements,
        collectives=4 * n + remembers if tp > 1 else 0,
        collective_elements=rows * w,
    )
