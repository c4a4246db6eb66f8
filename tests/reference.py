"""The numerical reference: the model and the training loop again, in one file of plain PyTorch.

Written from docs and MATH.md, without megatron-core, DeepSpeed or the code under test (only the configuration is
shared), so that a mistake has to be made twice to go unseen. Everything is batch-first and float32, and one
process holds the whole model. It is also the opponent of `megatron-bit bench step`.

Shape letters: b samples, S sequence, n blocks, K block size, M noise samples, B bits, D width, W head width.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_bit.config import Config

MicroBatch = tuple[Tensor, Tensor]  # tokens int64 [b, S], global sample indices int64 [b]
LEVEL_ELEMENT = 0xFFFF  # element counter of a block's noise level
FEATURES = 128  # sinusoids of the noise level
ZEROS = ("head.output", "head.prior", "head.prior_last", "embedding.memory", "head.memory", "head.inner_memory")
TABLES = ("embedding.start", "embedding.values", "embedding.pairs.factors", "head.previous", "head.values", "head.told",
          "head.pairs.factors", "head.seen_levels.slots")  # fmt: skip


# ---------------------------------------------------------------- noise: Philox4x32-10 on (seed, stream, sample, ...)
def philox(key: tuple[int, int], counter: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Four uint32 arrays [N] from a 64-bit key and four uint32 arrays [N]."""
    c0, c1, c2, c3 = counter
    for i in range(10):
        k0 = np.uint32((key[0] + i * 0x9E3779B9) & 0xFFFFFFFF)
        k1 = np.uint32((key[1] + i * 0xBB67AE85) & 0xFFFFFFFF)
        p0 = np.multiply(c0, np.uint64(0xD2511F53), dtype=np.uint64).view(np.uint32)  # little-endian: low, high
        p1 = np.multiply(c2, np.uint64(0xCD9E8D57), dtype=np.uint64).view(np.uint32)
        c0, c1, c2, c3 = p1[1::2] ^ c1 ^ k0, p1[0::2], p0[1::2] ^ c3 ^ k1, p0[0::2]
    return [c0, c1, c2, c3]


def _words(config: Config, stream: int, sample: Tensor, blocks: int, elements: np.ndarray) -> list[Tensor]:
    """Uniforms in (0, 1) for every (sample, block, noise sample, element): four float32 [b, n, M, E]."""
    m, seed = config.diffusion.noise_samples, config.train.seed
    ids = sample.cpu().numpy().astype(np.uint64)[:, None, None, None]
    counter = np.broadcast_arrays(
        np.arange(m)[None, None, :, None] * 65536 + elements,
        np.arange(blocks)[None, :, None, None],
        ids & np.uint64(0xFFFFFFFF),
        ids >> np.uint64(32),
    )
    shape = counter[0].shape
    key = (seed & 0xFFFFFFFF, ((seed >> 32) ^ (stream * 0x9E3779B9)) & 0xFFFFFFFF)
    words = philox(key, [c.astype(np.uint32).ravel() for c in counter])
    uniforms = [((w >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23) for w in words]
    return [torch.from_numpy(u).view(shape) for u in uniforms]


def draw_noise(
    config: Config, sample: Tensor, blocks: int, stream: int = 0, table: NoiseTable | None = None
) -> tuple[Tensor, Tensor]:
    """Stratified ln sigma [b, n, M] and standard normals [b, n, M, K, B]."""
    m = config.diffusion.noise_samples - config.diffusion.levels_apart
    first = _words(config, stream, sample, blocks, np.array([LEVEL_ELEMENT]))[0][:, :, :m, 0]
    u = (torch.arange(m) + first) / m
    return _log_sigma(config, u, table), _normals(config, stream, sample, blocks)[:, :, :m]


def _log_sigma(config: Config, u: Tensor, table: NoiseTable | None) -> Tensor:
    d = config.diffusion
    low, high = _level_cdf(config, d.sigma_min), _level_cdf(config, d.sigma_max)
    inside = low + u * (high - low)
    standard = (inside / (1 - inside)).log() if d.noise == "logistic" else torch.special.ndtri(inside)
    log_sigma = (d.log_mean + d.log_std * standard + math.log(2.0)).clamp(math.log(d.sigma_min), math.log(d.sigma_max))
    if d.noise == "entropy_rate":
        table = table or NoiseTable(config)
        cumulative = np.concatenate(([0.0], np.cumsum(table.masses())))
        log_sigma = torch.from_numpy(np.interp(u.double().numpy(), cumulative, table.edges)).float()
    return log_sigma


def _normals(config: Config, stream: int, sample: Tensor, blocks: int) -> Tensor:
    """[b, n, M, K, B]."""
    k, bits = config.model.block_size, config.model.bits
    count = k * bits
    u0, u1, u2, u3 = _words(config, stream, sample, blocks, np.arange((count + 3) // 4))
    r0, r1 = (-2.0 * u0.log()).sqrt(), (-2.0 * u2.log()).sqrt()
    a0, a1 = u1 * (2 * math.pi), u3 * (2 * math.pi)
    eps = torch.stack((r0 * a0.cos(), r0 * a0.sin(), r1 * a1.cos(), r1 * a1.sin()), dim=-1)
    return eps.flatten(3)[..., :count].unflatten(3, (k, bits))


def draw_apart(config: Config, sample: Tensor, blocks: int, table: NoiseTable | None) -> tuple[Tensor, Tensor]:
    """diffusion.levels_apart: ln sigma of every group [b, n, A, K, G], and standard normals [b, n, A, K, B]."""
    d, m, groups = config.diffusion, config.model, len(group_slices(config))
    count, parts = d.levels_apart, m.block_size * groups
    elements = np.arange(math.ceil(parts / 4))
    first = torch.stack(_words(config, 7, sample, blocks, elements), -1).flatten(3)[:, :, :count, :parts]
    turn = torch.stack(_words(config, 7, sample, blocks, elements + count * 65536), -1).flatten(3)[:, :, :1, :parts]
    place = torch.arange(count)[:, None] + (turn * count).floor()
    log_sigma = _log_sigma(config, (place.remainder(count) + first) / count, table).unflatten(3, (m.block_size, groups))
    return log_sigma, _normals(config, 8, sample, blocks)[:, :, :count]


def draw_front(config: Config, sample: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """diffusion.noisy_every: how far groups have come, in (0, 1), [b, n, K, G], and standard normals [b, n, K, B]."""
    m, groups = config.model, len(group_slices(config))
    count = m.block_size * groups
    u = torch.stack(_words(config, 9, sample, blocks, np.arange(math.ceil(count / 4))), -1).flatten(3)[:, :, 0, :count]
    kind, share, width = (x[:, :, 0] for x in _words(config, 9, sample, blocks, np.array([LEVEL_ELEMENT]))[:3])
    overlap = (4 * count) ** width  # [b, n, 1]
    front = ((share * (count - 1 + overlap) - torch.arange(count)) / overlap).clamp(0, 1)
    come = torch.where(kind < 1 / 3, u, torch.where(kind < 2 / 3, (u < share).float(), front))
    return come.unflatten(2, (m.block_size, groups)), _normals(config, 10, sample, blocks)[:, :, 0]


def _level_cdf(config: Config, sigma: float) -> float:
    d = config.diffusion
    standard = (math.log(sigma / 2) - d.log_mean) / d.log_std
    return 1 / (1 + math.exp(-standard)) if d.noise == "logistic" else 0.5 * (1.0 + math.erf(standard / math.sqrt(2.0)))


class NoiseTable:
    """diffusion.noise=entropy_rate: the rate of 128 bins of ln sigma, a decaying mean of what was drawn there."""

    def __init__(self, config: Config) -> None:
        d, self.config = config.diffusion, config
        self.edges = np.linspace(math.log(d.sigma_min), math.log(d.sigma_max), 129)
        self.sums, self.counts, self.steps = np.zeros(128), np.zeros(128), 0
        sigma = np.exp((self.edges[1:] + self.edges[:-1]) / 2)
        points, weights = np.polynomial.hermite_e.hermegauss(180)
        error = (1 - np.tanh((1 + sigma[:, None] * points) / sigma[:, None] ** 2)) ** 2
        self.independent = config.model.bits * error @ weights / weights.sum() / sigma**2
        self.damping = (sigma / 2) ** 3 / ((sigma / 2) ** 3 + 0.1**3)

    def masses(self) -> np.ndarray:
        """Probability of each bin: log-normal, then more and more of what was measured; 2 % are uniform then."""
        warmup = self.config.diffusion.noise_warmup
        rate = (self.sums + 1e-3 * self.independent) / (self.counts + 1e-3)
        wanted = self.damping * np.sqrt(rate)
        wanted = 0.98 * wanted / wanted.sum() + 0.02 / 128
        cumulative = np.array([_level_cdf(self.config, math.exp(e)) for e in self.edges])
        begin = np.diff(cumulative) / (cumulative[-1] - cumulative[0])
        blend = 1.0 if self.steps >= 2 * warmup else max(0.0, self.steps / warmup - 1)
        return (1 - blend) * begin + blend * wanted

    def density(self, log_sigma: Tensor) -> Tensor:
        """Over ln sigma, float32."""
        index = np.clip(np.searchsorted(self.edges, log_sigma.double().numpy(), side="right") - 1, 0, 127)
        return torch.from_numpy(self.masses()[index] / (self.edges[1] - self.edges[0])).float()

    def update(self, drawn: list[tuple[Tensor, Tensor]]) -> None:
        """Take in a step: of each micro-batch ln sigma [b, n, M] and error / sigma^2 [b, n, M, K]."""
        self.sums, self.counts, self.steps = 0.99 * self.sums, 0.99 * self.counts, self.steps + 1
        for log_sigma, rate in drawn:
            levels, weight = log_sigma.double().numpy().ravel(), 1 / (log_sigma.numel() * len(drawn))
            rates = rate.double().mean(-1).numpy().ravel()
            self.sums += np.histogram(levels, self.edges, weights=rates * weight)[0]
            self.counts += np.histogram(levels, self.edges)[0] * weight


# ---------------------------------------------------------------- initial values
def group_slices(config: Config) -> list[tuple[int, int]]:
    """First and last (exclusive) bit of each group: as few groups as possible, larger ones first, sizes within one."""
    bits, g = config.model.bits, config.model.group_bits
    count = math.ceil(bits / g)
    edges = np.cumsum([0] + [len(part) for part in np.array_split(np.arange(bits), count)])
    return [(int(a), int(b)) for a, b in itertools.pairwise(edges)]


def logical_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Logical name to shape of every parameter."""
    m, h = config.model, config.model.head
    d, w, head_dim = m.hidden_size, h.hidden_size, m.head_dim or m.hidden_size // m.num_heads
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.start": (m.block_size, d),
        "embedding.norm.weight": (d,),
        "backbone.final_layernorm.weight": (d,),
        "head.position": (m.block_size, w),
        "head.condition.weight": (w, d),
        "head.modulation.weight": (6 * w, w),
        "head.modulation.bias": (6 * w,),
        "head.final_modulation.weight": (2 * w, w),
        "head.final_modulation.bias": (2 * w,),
    }
    groups = group_slices(config)
    rows = len(groups) * 2 ** max(b - a for a, b in groups)  # of tables with a row for each value of each group
    outputs = m.bits if m.group_bits == 1 and h.kind == "diffusion" else rows
    shapes["head.output.weight"] = (outputs, w)
    if h.prior:
        shapes["head.prior.weight"] = (outputs, d)
    if m.block_size > 1:
        shapes["head.condition_last.weight"] = (w, d)
        if h.prior:
            shapes["head.prior_last.weight"] = (outputs, d)
    if h.kind == "chain":
        shapes |= {"head.previous": (rows, w), "head.values": (rows, w), "head.stage": (len(groups), w)}
        if config.noisy_every:
            shapes |= {
                "head.seen_levels.fc1.weight": (w, FEATURES),
                "head.seen_levels.fc2.weight": (w, w),
                "head.seen_levels.slots": (2 * len(groups), w),
            }
        if rank := m.prior_rank:
            shapes |= {"head.told": (rows, rank), "head.tied": (rows, rank), "head.tie.weight": (rank, d)}
            if m.block_size > 1:
                shapes["head.tie_last.weight"] = (rank, d)
    else:
        shapes |= {
            "head.input.weight": (w, m.bits),
            "head.noise_level.fc1.weight": (w, FEATURES * (len(groups) if config.diffusion.levels_apart else 1)),
            "head.noise_level.fc1.bias": (w,),
            "head.noise_level.fc2.weight": (w, w),
            "head.noise_level.fc2.bias": (w,),
        }
        if config.diffusion.self_condition:
            shapes["head.estimate.weight"] = (w, m.bits)
        if m.group_bits > 1:
            shapes["head.values"] = (rows, w)
        if m.token_before:
            shapes["head.before.weight"] = (w, w)
    if m.group_bits > 1:
        shapes["embedding.values"] = (rows, d)
    else:
        shapes |= {"embedding.fc1.weight": (d, m.bits), "embedding.fc2.weight": (d, d)}
    if m.pairs:
        shapes |= {"embedding.pairs.factors": (rows, 2 * d), "embedding.pairs.mix.weight": (d, 2 * d)}
        shapes |= {"head.pairs.factors": (rows, 2 * w), "head.pairs.mix.weight": (w, 2 * w)}
    if m.memory.rows:
        size = m.memory.rows * len(m.memory.orders) * m.memory.hashes
        shapes["embedding.memory.table"] = (size, d)
        if h.kind == "chain":
            shapes["head.memory.table"] = (size, w)
            if len(groups) > 1:
                shapes["head.inner_memory.table"] = (size, w)
    for i in range(m.num_layers):
        layer = f"backbone.layers.{i}."
        shapes[f"{layer}input_layernorm.weight"] = (d,)
        shapes[f"{layer}self_attention.linear_qkv.weight"] = ((m.num_heads + 2 * m.num_kv_heads) * head_dim, d)
        shapes[f"{layer}self_attention.linear_proj.weight"] = (d, m.num_heads * head_dim)
        if m.qk_norm:
            shapes[f"{layer}self_attention.q_layernorm.weight"] = (head_dim,)
            shapes[f"{layer}self_attention.k_layernorm.weight"] = (head_dim,)
        shapes[f"{layer}pre_mlp_layernorm.weight"] = (d,)
        shapes[f"{layer}mlp.linear_fc1.gate.weight"] = (m.ffn_hidden_size, d)
        shapes[f"{layer}mlp.linear_fc1.up.weight"] = (m.ffn_hidden_size, d)
        shapes[f"{layer}mlp.linear_fc2.weight"] = (d, m.ffn_hidden_size)
    for i in range(h.num_layers):
        layer = f"head.layers.{i}."
        shapes[f"{layer}qkv.weight"] = (3 * w, w)
        shapes[f"{layer}proj.weight"] = (w, w)
        shapes[f"{layer}fc1.gate.weight"] = (h.ffn_hidden_size, w)
        shapes[f"{layer}fc1.up.weight"] = (h.ffn_hidden_size, w)
        shapes[f"{layer}fc2.weight"] = (w, h.ffn_hidden_size)
    return shapes


def initial_weights(config: Config) -> dict[str, Tensor]:
    """Norms are one; AdaLN, biases and output zero; the rest normal, seeded by SHA-256 of "seed/name"."""
    m, weights = config.model, {}
    for name, shape in logical_shapes(config).items():
        owner, leaf = name.rsplit(".", 1)
        if leaf == "weight" and owner.endswith("norm"):
            weights[name] = torch.ones(shape)
        elif leaf == "bias" or owner.endswith("modulation") or owner in ZEROS or name == "head.tied":
            weights[name] = torch.zeros(shape)
        else:
            std = m.init_std
            if name in TABLES:
                std = 1.0
            elif owner.startswith(("head.noise_level", "head.seen_levels")):
                std = shape[1] ** -0.5
            elif owner in ("embedding.fc1", "head.input", "head.estimate"):
                std = m.bits**-0.5
            elif ".layers." in owner and owner.rsplit(".", 1)[1] in ("linear_proj", "linear_fc2", "proj", "fc2"):
                std /= math.sqrt(2 * (m.head.num_layers if owner.startswith("head") else m.num_layers))
            digest = hashlib.sha256(f"{config.train.seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            weights[name] = torch.randn(shape, generator=generator) * std
    return weights


# ---------------------------------------------------------------- memory: hashes of n-grams, in Python's integers
WORD = 2**64 - 1


def splitmix(x: int) -> int:
    """The finalizer of splitmix64."""
    x &= WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return x ^ x >> 31


def hash_factor(kind: int, index: int) -> int:
    """Of group, token back or table `index`; kind 0, 1, 2."""
    return splitmix((kind * 2**32 + index + 1) * 0x9E3779B97F4A7C15) | 1


def hash_values(values: Sequence[int]) -> int:
    """The key of a token's groups, or of the first ones of them."""
    return splitmix(sum((value + 1) * hash_factor(0, i) for i, value in enumerate(values)))


# ---------------------------------------------------------------- model
class ReferenceModel:
    """BitLM over a dict of leaf tensors (`weights`, by logical name; the given tensors are copied)."""

    def __init__(self, config: Config, weights: dict[str, Tensor], eos_id: int = 0) -> None:
        """eos_id: the token that ends a document."""
        if config.model.code not in ("binary", "gray", "raw"):
            raise ValueError(f"the reference knows binary and gray codes and raw bits, not {config.model.code!r}")
        expected = logical_shapes(config)
        assert {n: tuple(w.shape) for n, w in weights.items()} == expected, set(weights) ^ set(expected)
        self.config, self.table, self.eos_id = config, NoiseTable(config), eos_id
        self.drawn: list[tuple[Tensor, Tensor]] = []  # of the table's next update
        self.weights = {n: w.detach().clone().float().requires_grad_() for n, w in weights.items()}

    def encode(self, tokens: Tensor) -> Tensor:
        """Ids [...], or bytes [..., ceil(B / 8)], to float32 bits [..., B] of -1 and +1, the most significant first."""
        if self.config.model.code == "raw":
            return torch.from_numpy(np.unpackbits(tokens.numpy(), axis=-1, count=self.config.model.bits)) * 2.0 - 1
        if self.config.model.code == "gray":
            tokens = tokens ^ (tokens >> 1)
        shifts = torch.arange(self.config.model.bits - 1, -1, -1)
        return ((tokens[..., None] >> shifts) & 1).float() * 2 - 1

    def starts(self, tokens: Tensor) -> Tensor:
        """[b, S]: where each token's document begins, for all that a block can know; 0 if it is not to be known."""
        k, found = self.config.model.block_size, torch.zeros(tokens.shape[:2], dtype=torch.int64)
        if self.config.data.document_boundaries == "ignore":
            return found
        for row, ids in enumerate(tokens.tolist()):
            begin = 0
            for p in range(len(ids)):
                if p % k == 0 and self.eos_id in ids[max(0, p - k) : p]:
                    begin = p
                found[row, p] = begin
        return found

    def same_document(self, tokens: Tensor) -> Tensor | None:
        """[b, S, S], of two tokens; None if every token may see all documents of its sample."""
        if self.config.data.document_boundaries != "mask":
            return None
        start = self.starts(tokens)
        return start[:, :, None] == start[:, None, :]

    def hidden(self, tokens: Tensor, sample: Tensor | None = None) -> Tensor:
        """tokens [b, S] to [b, S, D]; row p conditions token p and knows the blocks before p's alone.

        sample [b]: flip the bits that training gets wrong.
        """
        m, w = self.config.model, self.weights
        batch, length = tokens.shape[:2]
        x = w["embedding.start"].expand(batch, -1, -1)
        if length > m.block_size:
            bits = self.encode(tokens[:, : length - m.block_size])
            if sample is not None and self.config.diffusion.context_noise:
                bits = bits * self._flips(sample, length // m.block_size)
            if m.group_bits > 1:
                embedded = self._name("embedding.values", "embedding.pairs", self._one_hot(self.values(bits)))
            else:
                embedded = F.silu(bits @ w["embedding.fc1.weight"].T) @ w["embedding.fc2.weight"].T
            if m.memory.rows:
                known = [[p + 1 - start for p, start in enumerate(row)] for row in self._starts_of_inputs(tokens)]
                embedded = embedded + self._remember("embedding.memory", self.values(bits), known)
            x = torch.cat((x, self._norm(embedded, "embedding.norm")), dim=1)
        inside = torch.arange(length) - self.starts(tokens)  # [b, S]
        if self.config.data.document_boundaries == "mask":
            rows = [[w["embedding.start"][q] if q < m.block_size else row[p] for p, q in enumerate(places)]
                    for row, places in zip(x, inside.tolist(), strict=True)]  # fmt: skip
            x = torch.stack([torch.stack(row) for row in rows])
        angle = self._rope_angles(length)[inside]  # [b, S, d / 2]
        same, mask = self.same_document(tokens), None
        if m.attention == "block_causal" or same is not None:
            block = torch.arange(length) // (m.block_size if m.attention == "block_causal" else 1)
            mask = block[:, None] >= block
            mask = mask if same is None else (mask & same)[:, None]
        for i in range(m.num_layers):
            layer = f"backbone.layers.{i}."
            x = x + self._attention(self._norm(x, f"{layer}input_layernorm"), f"{layer}self_attention.", angle, mask)
            y = self._norm(x, f"{layer}pre_mlp_layernorm")
            x = x + self._swiglu(y, f"{layer}mlp.linear_fc1", f"{layer}mlp.linear_fc2")
        return self._norm(x, "backbone.final_layernorm")

    def _flips(self, sample: Tensor, blocks: int) -> Tensor:
        """-1 where a bit of the input is wrong, else 1: [b, (n - 1) K, B]. Keyed by the block that is conditioned."""
        size = (self.config.model.block_size, self.config.model.bits)
        share = _words(self.config, 4, sample, 1, np.array([LEVEL_ELEMENT]))[0][:, :1, 0]  # [b, 1, 1]
        words = _words(self.config, 4, sample, blocks, np.arange(math.ceil(math.prod(size) / 4)))
        u = torch.stack([word[:, 1:, 0] for word in words], -1).flatten(2)[..., : math.prod(size)]
        return 1 - 2 * (u < self.config.diffusion.context_noise * share).float().unflatten(2, size).flatten(1, 2)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.config.model.norm_eps)

    def _swiglu(self, x: Tensor, fc1: str, fc2: str) -> Tensor:
        w = self.weights
        return (F.silu(x @ w[f"{fc1}.gate.weight"].T) * (x @ w[f"{fc1}.up.weight"].T)) @ w[f"{fc2}.weight"].T

    def _rope_angles(self, length: int) -> Tensor:
        m = self.config.model
        dim = m.head_dim or m.hidden_size // m.num_heads
        inverse = 1.0 / m.rope_base ** (torch.arange(0, dim, 2).float() / dim)
        return torch.outer(torch.arange(length).float(), inverse)  # [S, d / 2]

    def _attention(self, x: Tensor, prefix: str, angle: Tensor, mask: Tensor | None) -> Tensor:
        m = self.config.model
        dim, group = m.head_dim or m.hidden_size // m.num_heads, m.num_heads // m.num_kv_heads
        # the fused rows go group by group: the group's query heads, its key head, its value head
        mixed = (x @ self.weights[f"{prefix}linear_qkv.weight"].T).unflatten(-1, (m.num_kv_heads, group + 2, dim))
        q, k, v = mixed[..., :group, :].flatten(2, 3), mixed[..., group, :], mixed[..., group + 1, :]
        if m.qk_norm:
            q, k = self._norm(q, f"{prefix}q_layernorm"), self._norm(k, f"{prefix}k_layernorm")
        q, k, v = (t.transpose(1, 2) for t in (_rotate(q, angle), _rotate(k, angle), v))
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return out.transpose(1, 2).flatten(2) @ self.weights[f"{prefix}linear_proj.weight"].T

    def values(self, bits: Tensor) -> list[Tensor]:
        """Bits [..., B] to the value of each group: a list of int64 [...], the group's first bit counting most."""
        found = []
        for first, last in group_slices(self.config):
            value = torch.zeros(bits.shape[:-1], dtype=torch.int64)
            for j in range(first, last):
                value = 2 * value + (bits[..., j] > 0).long()
            found.append(value)
        return found

    def _look_up(self, table: str, values: list[Tensor]) -> list[Tensor]:
        """Each group's embeddings [..., width]; a table has as many rows for each group as the largest one needs."""
        rows = self.weights[table].unflatten(0, (len(values), -1))
        return [rows[i][value] for i, value in enumerate(values)]

    def _one_hot(self, values: list[Tensor]) -> list[Tensor]:
        """Of each group [..., U]."""
        rows = 2 ** max(b - a for a, b in group_slices(self.config))
        return [F.one_hot(value, rows).float() for value in values]

    def _name(self, table: str, pairs: str, weights: list[Tensor]) -> Tensor:
        """[..., width], what groups are called whose values have these weights [..., U]: the sum of their embeddings,
        and with names=pairs the products of every two of them in a second table, through a map."""
        rows = self.weights[table].unflatten(0, (len(weights), -1))
        out = sum(p @ rows[i] for i, p in enumerate(weights))
        if self.config.model.pairs:
            factors = self.weights[f"{pairs}.factors"].unflatten(0, (len(weights), -1))
            u = [p @ factors[i] for i, p in enumerate(weights)]
            every_two = list(itertools.combinations(u, 2))
            product = sum(a * b for a, b in every_two) / math.sqrt(len(every_two))
            out = out + product @ self.weights[f"{pairs}.mix.weight"].T
        return out

    def _starts_of_inputs(self, tokens: Tensor) -> list[list[int]]:
        """Where the document begins that the position which reads token p (p + K) is in, for all p but the last K."""
        k, masked = self.config.model.block_size, self.config.data.document_boundaries == "mask"
        return [[begin if masked else 0 for begin in row[k:]] for row in self.starts(tokens).tolist()]

    def _remember(
        self, table: str, values: list[Tensor], known: list[list[int]], begun: list[list[Sequence[int]]] | None = None
    ) -> Tensor:
        """[b, S, width]: the embeddings of the n-grams that end with each token, of values [b, S].

        known: how many tokens of its document there are up to each. begun: the first groups of the token behind each,
        which the n-grams end with then, and have a token less.
        """
        memory, weights = self.config.model.memory, self.weights[f"{table}.table"]
        keys = [
            [hash_values(token) for token in zip(*row, strict=True)]
            for row in zip(*(v.tolist() for v in values), strict=True)
        ]
        out = []
        for b, row in enumerate(keys):
            for p in range(len(row)):
                total = torch.zeros(weights.shape[1])
                for i, order in enumerate(memory.orders):
                    count = order if begun is None else order - 1
                    if known[b][p] < count:
                        continue
                    key = sum(row[p - j] * hash_factor(1, j) for j in range(count))
                    if begun is not None:
                        key += hash_values(begun[b][p]) * hash_factor(1, 63)
                    for k in range(memory.hashes):
                        number = i * memory.hashes + k
                        place = (splitmix(key + hash_factor(2, number)) & WORD >> 1) % memory.rows
                        total = total + weights[number * memory.rows + place]
                out.append(total)
        return torch.stack(out).unflatten(0, (len(keys), -1))

    def _kept(self, sample: Tensor, blocks: int) -> Tensor | None:
        """[b, n], 0 where training hides the backbone from a block's head, else 1."""
        if not self.config.diffusion.condition_drop:
            return None
        u = _words(self.config, 5, sample, blocks, np.array([LEVEL_ELEMENT]))[0][:, :, 0, 0]
        return 1 - (u < self.config.diffusion.condition_drop).float()

    def _of_block(self, name: str, hidden: Tensor, kept: Tensor | None = None) -> Tensor:
        """hidden [b, S, D] to [b, n, K, out]: linear in a row's own state, and in the state of its block's last row.

        kept [b, n]: 0 where a block does without.
        """
        blocks = hidden.unflatten(1, (-1, self.config.model.block_size))
        out = blocks @ self.weights[f"head.{name}.weight"].T
        if self.config.model.block_size > 1:
            out = out + (blocks[:, :, -1] @ self.weights[f"head.{name}_last.weight"].T)[:, :, None]
        return out if kept is None else out * kept[:, :, None, None]

    def _head_layers(self, x: Tensor, condition: Tensor, same: Tensor | None = None) -> Tensor:
        """x and condition [b, n, M, K, W]; M evaluations of each block, apart from each other.

        same [b, S, S]: whether two tokens of a chain may see each other.
        """
        m, w = self.config.model, self.weights
        modulation = F.linear(condition, w["head.modulation.weight"], w["head.modulation.bias"]).chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        x = x + w["head.position"]
        for i in range(m.head.num_layers):
            layer = f"head.layers.{i}."
            y = _adaptive_norm(x, shift_a, scale_a) @ w[f"{layer}qkv.weight"].T
            chain = m.head.kind == "chain"  # whose attention runs over the whole sequence [b, S], others' over a block
            y = (y[:, :, 0].flatten(1, 2) if chain else y.flatten(0, 2)).unflatten(-1, (m.head.num_heads, 3, -1))
            q, k, v = (y[:, :, :, j] for j in range(3))  # rows head by head: query, key, value
            back = torch.arange(y.shape[1])[:, None] - torch.arange(y.shape[1])
            sees = (back >= 0) & (back < m.head.window) if chain else torch.ones_like(back, dtype=torch.bool)
            if same is not None:
                sees = (sees & same)[:, None]
            if chain:
                inverse = 1.0 / m.rope_base ** (torch.arange(0, q.shape[-1], 2).float() / q.shape[-1])
                angle = torch.outer(torch.arange(y.shape[1]).float(), inverse)
                q, k = _rotate(q, angle), _rotate(k, angle)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            weight = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(~sees, float("-inf")).softmax(-1)
            attended = (weight @ v).transpose(1, 2).reshape(x.shape)
            x = x + gate_a * (attended @ w[f"{layer}proj.weight"].T)
            x = x + gate_m * self._swiglu(_adaptive_norm(x, shift_m, scale_m), f"{layer}fc1", f"{layer}fc2")
        final = F.linear(condition, w["head.final_modulation.weight"], w["head.final_modulation.bias"])
        return _adaptive_norm(x, *final.chunk(2, dim=-1))

    def head(
        self,
        z: Tensor,
        log_sigma: Tensor,
        hidden: Tensor,
        kept: Tensor | None = None,
        estimate: Tensor | float = 0.0,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Noisy bits [b, n, M, K, B], ln sigma [b, n, M], hidden [b, S, D] to head outputs [b, n, M, K, outputs].

        ln sigma may also be of every group, [b, n, M, K, G].
        estimate [b, n, M, K, B]: what is shown of the head's own estimate of the clean bits.
        tokens [b, S]: for the token before each.
        """
        m, w = self.config.model, self.weights
        half = FEATURES // 2  # rounding matters here: the highest of these multiplies an ulp by 1000
        frequency = (torch.arange(half).double() * (math.log(100.0) / (half - 1))).exp().float()
        told = log_sigma if log_sigma.dim() == 5 else log_sigma[..., None, None]
        told = told.expand(*told.shape[:4], len(group_slices(self.config)) if self.config.diffusion.levels_apart else 1)
        angle = told[..., None] / 4 * frequency
        level = torch.cat((angle.cos(), angle.sin()), dim=-1).flatten(-2)
        level = F.linear(level, w["head.noise_level.fc1.weight"], w["head.noise_level.fc1.bias"])
        level = F.linear(F.silu(level), w["head.noise_level.fc2.weight"], w["head.noise_level.fc2.bias"])
        context = self._of_block("condition", hidden, kept)[:, :, None]
        condition = F.silu(level + context)  # [b, n, M, K, W]
        sigma = self._sigma(log_sigma)
        scaled = z / (1.0 + sigma**2).sqrt()
        x = scaled @ w["head.input.weight"].T
        if isinstance(estimate, Tensor):
            x = x + estimate @ w["head.estimate.weight"].T
        if m.group_bits > 1:
            odds = (2 * z / sigma**2).clamp(-30, 30)
            widest = 2 ** max(b - a for a, b in group_slices(self.config))
            said = [e for _, e in self._evidence(odds)]
            if m.soft_prior:
                prior = self._of_block("prior", hidden, kept)[:, :, None].unflatten(-1, (len(said), -1))
                said = [e + prior[..., i, : e.shape[-1]] for i, e in enumerate(said)]
            likely = [F.pad(e.softmax(-1), (0, widest - e.shape[-1])) for e in said]
            name = self._name("head.values", "head.pairs", likely)
            x = x + name
            if m.token_before:
                x = x + self._names_before(name, tokens) @ w["head.before.weight"].T
        out = self._head_layers(x + context, condition) @ w["head.output.weight"].T
        return out + self._of_block("prior", hidden, kept)[:, :, None] if m.head.prior else out

    def _sigma(self, log_sigma: Tensor) -> Tensor:
        """Of the noise on bits, [b, n, M, 1, 1] or [b, n, M, K, B]."""
        if log_sigma.dim() == 3:
            return log_sigma.exp()[..., None, None]
        sizes = torch.tensor([last - first for first, last in group_slices(self.config)])
        return log_sigma.exp().repeat_interleave(sizes, dim=-1)

    def _names_before(self, name: Tensor, tokens: Tensor | None) -> Tensor:
        """name [b, n, M, K, W] of each token to those of the tokens before, tokens [b, S] for the first of a block."""
        assert tokens is not None
        clean = self._name("head.values", "head.pairs", self._one_hot(self.values(self.encode(tokens))))  # [b, S, W]
        same, k, out = self.same_document(tokens), self.config.model.block_size, torch.zeros_like(name)
        for b, n, place in itertools.product(range(name.shape[0]), range(name.shape[1]), range(k)):
            if place:
                out[b, n, :, place] = name[b, n, :, place - 1]
            elif n and (same is None or same[b, n * k, n * k - 1]):
                out[b, n, :, 0] = clean[b, n * k - 1]
        return out

    def _evidence(self, odds: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Log-odds of bits [..., B] to each group's codes [2^n, n] and unnormalised log-probabilities [..., 2^n]."""
        found = []
        for first, last in group_slices(self.config):
            codes = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=last - first)))
            found.append((codes, odds[..., first:last] @ codes.T / 2))
        return found

    def loss(self, tokens: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Training loss and likelihood bound (nats a token), means over the tokens of a micro-batch."""
        if self.config.model.head.kind == "chain":
            nats = self.chain(tokens, sample)
            again = self.noisy_chain(tokens, sample) if self.config.noisy_every else nats[:0]
            loss = torch.cat((nats.flatten(), again.flatten())).mean()  # over all evaluations
            return loss, nats.detach().mean()
        d, m, k = self.config.diffusion, self.config.model, self.config.model.block_size
        blocks = tokens.shape[1] // k
        log_sigma, eps = draw_noise(self.config, sample, blocks, table=self.table)
        x = self.encode(tokens).unflatten(1, (-1, k))[:, :, None]  # [b, n, 1, K, B]
        mse = d.loss == "mse" or (d.loss == "auto" and m.group_bits == 1)
        u = _words(self.config, 6, sample, blocks, np.array([LEVEL_ELEMENT]))[0][..., 0]
        shown = (u < d.self_condition).float()[..., None, None]
        states = (self.hidden(tokens, sample), self._kept(sample, blocks), tokens)
        wrong, entropy = self._evaluate(
            x, log_sigma, eps, states, None if shown is None else shown[:, :, : eps.shape[2]]
        )
        sigma = log_sigma.exp()[..., None, None]
        error = (2 * wrong) ** 2  # (x - E x)^2 without cancellation
        losses = [(sigma**2 + 1) / sigma**2 * error if mse else entropy]
        if d.levels_apart:
            levels, eps = draw_apart(self.config, sample, blocks, self.table)
            missed, entropy = self._evaluate(x, levels, eps, states, shown[:, :, -d.levels_apart :])
            variance = self._sigma(levels) ** 2
            losses.append((variance + 1) / variance * (2 * missed) ** 2 if mse else entropy)
        loss = torch.cat(losses, dim=2).mean()
        mass = _level_cdf(self.config, d.sigma_max) - _level_cdf(self.config, d.sigma_min)
        if d.noise == "lognormal":
            density = torch.distributions.Normal(d.log_mean + math.log(2.0), d.log_std).log_prob(log_sigma).exp() / mass
        elif d.noise == "logistic":
            tail = (-(log_sigma - math.log(2.0) - d.log_mean) / d.log_std).exp()
            density = tail / (1 + tail) ** 2 / d.log_std / mass
        else:
            density = self.table.density(log_sigma)
        rate = error.detach().sum(-1) / sigma.squeeze(-1) ** 2  # [b, n, M, K]
        self.drawn.append((log_sigma, rate))
        integrand = rate / density[..., None]
        return loss, integrand.mean()

    def _evaluate(
        self,
        x: Tensor,
        log_sigma: Tensor,
        eps: Tensor,
        states: tuple[Tensor, Tensor | None, Tensor],
        shown: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """P(wrong) of every bit [b, n, M, K, B], and the cross-entropy of each or, of each group, [b, n, M, K, G].

        states: hidden [b, S, D], which blocks keep it, and tokens [b, S]; shown [b, n, M, 1, 1]: 0 or 1.
        """
        m, (hidden, kept, tokens), sigma = self.config.model, states, self._sigma(log_sigma)
        z = x + sigma * eps
        estimate: Tensor | float = 0.0
        if self.config.diffusion.self_condition:
            with torch.no_grad():
                first = self._mean(self.head(z, log_sigma, hidden, kept, tokens=tokens), z, sigma)
            estimate = first * shown
        out = self.head(z, log_sigma, hidden, kept, estimate, tokens)
        matched = self.config.diffusion.parameterization == "matched_filter"
        odds = (2 * z / sigma**2).clamp(-30, 30) if matched else torch.zeros_like(z)
        if m.group_bits == 1:
            logits = out + odds
            entropy = F.binary_cross_entropy_with_logits(logits, ((x + 1) / 2).expand_as(logits), reduction="none")
            return torch.sigmoid(-x * logits), entropy
        out, values = out.unflatten(-1, (len(group_slices(self.config)), -1)), self.values(x)
        parts, crosses = [], []
        for i, (codes, evidence) in enumerate(self._evidence(odds)):
            first, last = group_slices(self.config)[i]
            log_p = (out[..., i, : len(codes)] + evidence).log_softmax(-1)
            differs = codes[None] != x[..., first:last].unsqueeze(-2)  # [b, n, 1, K, 2^n, bits of the group]
            parts.append((log_p.exp().unsqueeze(-1) * differs).sum(-2))
            crosses.append(-log_p.gather(-1, values[i].expand(log_p.shape[:-1])[..., None]))
        return torch.cat(parts, dim=-1), torch.cat(crosses, dim=-1)

    def _mean(self, out: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
        """Head outputs to the expectation of each bit, [b, n, M, K, B]."""
        matched = self.config.diffusion.parameterization == "matched_filter"
        odds = (2 * z / sigma**2).clamp(-30, 30) if matched else torch.zeros_like(z)
        if self.config.model.group_bits == 1:
            return ((out + odds) / 2).tanh()
        out = out.unflatten(-1, (len(group_slices(self.config)), -1))
        found = self._evidence(odds)
        return torch.cat([(out[..., i, : len(c)] + e).softmax(-1) @ c for i, (c, e) in enumerate(found)], dim=-1)

    def _inside(self, values: list[Tensor], i: int, counts: list[list[int]]) -> Tensor:
        """[b, S, W]: what the memory says of each token's first i groups behind the tokens before it."""
        begun = torch.stack(values[:i], -1).tolist()
        # as if a token without groups stood before the first one: it is never looked at
        shifted = [F.pad(v[:, :-1], (1, 0)) for v in values]
        return self._remember("head.inner_memory", shifted, [[0, *row] for row in counts], begun)

    def chain(self, tokens: Tensor, sample: Tensor) -> Tensor:
        """tokens [b, S] to nats [b, S], one stage after another."""
        hidden, kept = self.hidden(tokens, sample), self._kept(sample, tokens.shape[1] // self.config.model.block_size)
        seen = self._one_hot(self.values(self.encode(tokens)))
        return self._stages(tokens, hidden, kept, seen, self._counts(tokens))

    def _counts(self, tokens: Tensor) -> list[list[int]]:
        """How many tokens of its document stand before each token but the first."""
        masked = self.same_document(tokens) is not None
        return [[p + 1 - (begin if masked else 0) for p, begin in enumerate(row[1:])]
                for row in self.starts(tokens).tolist()]  # fmt: skip

    def noisy_chain(self, tokens: Tensor, sample: Tensor) -> Tensor:
        """diffusion.noisy_every: nats [all, K] of the blocks that are evaluated once more, each by itself: the sequence
        with this block's tokens seen through noise, of which its own rows are taken."""
        m, found = self.config.model, []
        blocks, k = tokens.shape[1] // m.block_size, m.block_size
        hidden, kept = self.hidden(tokens, sample), self._kept(sample, blocks)
        come, eps = draw_front(self.config, sample, blocks)
        for b, number in enumerate(sample.tolist()):
            for cell, first in enumerate(range(0, blocks, self.config.noisy_every)):
                n = first + (number + cell) % min(self.config.noisy_every, blocks - first)
                row, rows = tokens[b : b + 1], slice(n * k, (n + 1) * k)
                states, keeps = hidden[b : b + 1], None if kept is None else kept[b : b + 1]
                x, decided = self.encode(row[:, rows])[0], come[b, n] >= 1  # [K, B], [K, G]
                log_sigma = _log_sigma(self.config, 1 - come[b, n], None)
                sizes = torch.tensor([last - first for first, last in group_slices(self.config)])
                sigma = log_sigma.exp().repeat_interleave(sizes, dim=-1)
                odds = (2 * (x + sigma * eps[b, n]) / sigma**2).clamp(-30, 30)
                odds = odds * (come[b, n] > 0).repeat_interleave(sizes, dim=-1)
                seen = [s.clone() for s in self._one_hot(self.values(self.encode(row)))]
                for i, (_, said) in enumerate(self._evidence(odds)):
                    if m.head.prior:
                        prior = self._of_block("prior", states, keeps).flatten(1, 2)[0, rows]
                        said = said + prior.unflatten(-1, (len(seen), -1))[:, i, : said.shape[-1]]
                    likely = F.pad(said.softmax(-1), (0, seen[i].shape[-1] - said.shape[-1]))
                    seen[i][0, rows] = torch.where(decided[:, i, None], seen[i][0, rows], likely)
                level = torch.zeros(1, tokens.shape[1], len(seen), m.head.hidden_size)
                told = torch.stack([self._told_of_noise(log_sigma, decided, p, i)
                                    for p in range(k) for i in range(len(seen))])  # fmt: skip
                level[0, rows] = told.unflatten(0, (k, -1))
                counts = self._counts(row)
                for p in range(max(1, rows.start + 1), rows.stop):  # n-grams end with what is decided
                    before = counts[0][p - 2] if p > 1 else 0
                    counts[0][p - 1] = min(counts[0][p - 1], before + 1) if decided[p - 1 - rows.start].all() else 0
                whole = torch.ones(1, tokens.shape[1], len(seen))
                whole[0, rows] = decided.float().cumprod(-1)
                nats = self._stages(row, states, keeps, seen, counts, level, whole)
                found.append(nats[0, rows])
        return torch.stack(found)

    def _told_of_noise(self, log_sigma: Tensor, decided: Tensor, place: int, group: int) -> Tensor:
        """[W], of log_sigma and decided [K, G]: what a group of a block hears of the noise on what it sees."""
        w, half = self.weights, FEATURES // 2
        frequency = (torch.arange(half).double() * (math.log(100.0) / (half - 1))).exp().float()
        own, before = w["head.seen_levels.slots"].chunk(2)
        total = torch.zeros(w["head.seen_levels.slots"].shape[1])
        looked_at = [(place, j, own[j]) for j in range(group)]
        looked_at += [(place - 1, j, before[j]) for j in range(decided.shape[1]) if place]
        for p, j, slot in looked_at:
            if not decided[p, j]:
                angle = log_sigma[p, j] / 4 * frequency
                total = total + slot * (w["head.seen_levels.fc1.weight"] @ torch.cat((angle.cos(), angle.sin())))
        return w["head.seen_levels.fc2.weight"] @ F.silu(total)

    def _stages(
        self,
        tokens: Tensor,
        hidden: Tensor,
        kept: Tensor | None,
        seen: list[Tensor],
        counts: list[list[int]],
        level: Tensor | None = None,
        whole: Tensor | None = None,
    ) -> Tensor:
        """Nats [b, S] of tokens, of whose groups the rows are shown values with the weights `seen` [b, S, U].

        level: [b, S, G, W], beside the stage. whole: [b, S, G], 0 where a group or one before it is not decided.
        """
        w, k, m = self.weights, self.config.model.block_size, self.config.model
        values = self.values(self.encode(tokens))
        before = self._name("head.previous", "head.pairs", [s[:, :-1] for s in seen])
        same = self.same_document(tokens)
        if same is not None:  # nothing stands before a document
            before = before * same.diagonal(-1, 1, 2)[..., None]
        if m.memory.rows:
            before = before + self._remember("head.memory", [v[:, :-1] for v in values], counts)
        known = F.pad(before, (0, 0, 1, 0)).unflatten(1, (-1, k))[:, :, None]  # [b, n, 1, K, W]
        total, told = torch.zeros(tokens.shape[:2]), 0.0
        for i, (first, last) in enumerate(group_slices(self.config)):
            context = self._of_block("condition", hidden, kept)[:, :, None]
            stage = w["head.stage"][i]
            if level is not None:
                stage = stage + level[:, :, i].unflatten(1, (-1, k))[:, :, None]
            condition = F.silu(stage + context)
            given = known
            if i and m.memory.rows:
                inside = self._inside(values, i, counts)
                if whole is not None:
                    inside = inside * whole[:, :, i - 1, None]
                given = known + inside.unflatten(1, (-1, k))[:, :, None]
            features = self._head_layers(given + context, condition, same)[:, :, 0].flatten(1, 2)  # [b, S, W]
            logits = features @ w["head.output.weight"].unflatten(0, (len(values), -1))[i].T
            if m.head.prior:
                prior = self._of_block("prior", hidden, kept).flatten(1, 2)
                logits = logits + prior.unflatten(-1, (len(values), -1))[..., i, :]
            if m.prior_rank:  # the groups before, times the states, onto this group's values
                ties = self._of_block("tie", hidden, kept).flatten(1, 2) * told
                logits = logits + ties @ w["head.tied"].unflatten(0, (len(values), -1))[i].T
                told = told + seen[i] @ w["head.told"].unflatten(0, (len(values), -1))[i]
            log_p = logits[..., : 2 ** (last - first)].log_softmax(-1)
            total = total - log_p.gather(-1, values[i][..., None]).squeeze(-1)
            own = seen[i] @ w["head.values"].unflatten(0, (len(values), -1))[i]
            known = known + own.unflatten(1, (-1, k))[:, :, None]
        return total


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary embedding of [b, S, heads, d]: channel i turns with channel i + d / 2."""
    cos, sin = angle.cos()[..., None, :], angle.sin()[..., None, :]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _adaptive_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


# ---------------------------------------------------------------- training
def schedule(config: Config, step: int) -> float:
    """Learning rate of update `step` (0-based) over the peak."""
    o, total = config.optim, config.train.steps
    warmup = min(o.warmup_steps, total)
    if step < warmup:
        return (step + 1) / warmup
    if o.schedule == "cosine":
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        return o.min_lr_ratio + (1 - o.min_lr_ratio) * (1 + math.cos(math.pi * done)) / 2
    begin = max(warmup, total - max(1, round(total * o.decay_fraction)))
    done = min(1.0, max(0, step - begin) / max(1, total - begin))
    return 1 - (1 - o.min_lr_ratio) * done


class ReferenceTrainer:
    """AdamW on a ReferenceModel; a step is a global batch."""

    def __init__(self, config: Config, weights: dict[str, Tensor]) -> None:
        o = config.optim
        self.config, self.model, self.updates = config, ReferenceModel(config, weights), 0
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, weight in self.model.weights.items():
            decay = weight.dim() > 1 and name not in ("embedding.start", "head.position")
            groups.setdefault((name.startswith("head."), decay), []).append(weight)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": p, "weight_decay": o.weight_decay * decay, "head": head}
                for (head, decay), p in groups.items()
            ],
            lr=o.lr,
            betas=o.betas,
            eps=o.eps,
            fused=True,
        )

    def step(self, micro_batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
        """One update from the mean gradient; returns ([loss, bound], gradient norm before clipping)."""
        o = self.config.optim
        self.optimizer.zero_grad()
        total = torch.zeros(2)
        for tokens, sample, *_ in micro_batches:
            loss, bound = self.model.loss(tokens, sample)
            (loss / len(micro_batches)).backward()
            total += torch.stack((loss.detach(), bound)) / len(micro_batches)
        norm = torch.nn.utils.clip_grad_norm_(list(self.model.weights.values()), o.grad_clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = o.lr * schedule(self.config, self.updates) * (o.head_lr_scale if group["head"] else 1.0)
        self.optimizer.step()
        self.updates += 1
        if self.model.drawn:
            self.model.table.update(self.model.drawn)
            self.model.drawn.clear()
        return total, norm


def train_reference(
    config: Config, weights: dict[str, Tensor], steps: Sequence[Sequence[MicroBatch]]
) -> tuple[list[float], list[float], list[float], dict[str, Tensor]]:
    """Train from `weights`, one update for every list of micro-batches.

    Returns:
        losses, likelihood bounds and gradient norms (before clipping) of every step, and the final weights.
    """
    trainer = ReferenceTrainer(config, weights)
    results = [trainer.step(micro_batches) for micro_batches in steps]
    losses, bounds = [t[0].item() for t, _ in results], [t[1].item() for t, _ in results]
    return losses, bounds, [n.item() for _, n in results], {n: w.detach() for n, w in trainer.model.weights.items()}
