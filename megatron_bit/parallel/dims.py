"""ParallelDims: the degrees of parallelism, checked once against the world size. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_bit.config import Config
from megatron_bit.errors import UserError
from megatron_bit.parallel.fp8_sizes import check_fp8_sizes
from megatron_bit.parallel.split import least_layers

BUCKET = 500_000_000  # most elements of a bucket in which ZeRO reduces gradients; a smaller model has a smaller one


@dataclass(frozen=True)
class ParallelDims:
    """Degrees whose product is the world size.

    Ranks are laid out as megatron-core does: tensor-parallel innermost, then data, then pipeline.
    """

    tp: int
    pp: int
    dp: int
    vpp: int
    sequence_parallel: bool
    zero_stage: int

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def num_chunks(self) -> int:
        """Model chunks over the whole pipeline."""
        return self.pp * self.vpp

    def micro_batches(self, config: Config) -> int:
        """Micro-batches a step on one data-parallel rank."""
        return config.train.global_batch_size // (config.train.micro_batch_size * self.dp)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pp, dp, tp) rank of a global rank."""
        tp = rank % self.tp
        dp = rank // self.tp % self.dp
        return rank // (self.tp * self.dp), dp, tp

    def __str__(self) -> str:
        parts = [f"TP={self.tp}", f"PP={self.pp}", f"DP={self.dp}"]
        if self.vpp > 1:
            parts.append(f"VPP={self.vpp}")
        if self.sequence_parallel:
            parts.append("SP")
        return " ".join(parts)

    @classmethod
    def build(cls, config: Config, world_size: int) -> ParallelDims:
        """Check the degrees against the world size and the model; UserError says what would fit."""
        p, m, t = config.parallel, config.model, config.train
        if world_size < 1:
            raise UserError(f"world size {world_size} is not possible; it has to be at least 1")
        if world_size % (p.tp * p.pp):
            fits = -(-world_size // (p.tp * p.pp)) * p.tp * p.pp
            degrees = ((a, b) for a in divisors(world_size) for b in divisors(world_size // a))
            layouts = [f"tp={a} pp={b}" for a, b in degrees if cls._fits(config, a, b, world_size)]
            raise UserError(
                f"parallel.tp {p.tp} x parallel.pp {p.pp} = {p.tp * p.pp} does not divide the world size {world_size}; "
                f"start {fits} ranks" + (f", or use one of: {', '.join(layouts[:8])}" if layouts else "")
            )
        dp = world_size // (p.tp * p.pp)
        divided = {
            "model.num_heads": m.num_heads,
            "model.num_kv_heads": m.num_kv_heads,
            "model.ffn_hidden_size": m.ffn_hidden_size,
        }
        if m.head.kind != "softmax":
            divided |= {"model.head.num_heads": m.head.num_heads, "model.head.ffn_hidden_size": m.head.ffn_hidden_size}
        if m.memory.rows:
            divided["model.memory.rows"] = m.memory.rows
        for key, value in divided.items():
            if value % p.tp:
                allowed = [d for d in divisors(value) if d <= 64]
                raise UserError(f"{key} {value} cannot be split over parallel.tp {p.tp}; tp may be one of {allowed}")
        check_vocabulary(config)
        sequence_parallel = p.sequence_parallel and p.tp > 1
        if sequence_parallel and config.data.seq_length % (p.tp * m.block_size):
            raise UserError(
                f"data.seq_length {config.data.seq_length} has to be a multiple of parallel.tp x model.block_size = "
                f"{p.tp * m.block_size} for sequence parallelism; change it, or set parallel.sequence_parallel=false"
            )
        check_fp8_sizes(config, p.tp, sequence_parallel)
        if t.global_batch_size % (t.micro_batch_size * dp):
            unit = t.micro_batch_size * dp
            up = -(-t.global_batch_size // unit) * unit
            raise UserError(
                f"train.global_batch_size {t.global_batch_size} has to be a multiple of train.micro_batch_size "
                f"{t.micro_batch_size} x data-parallel size {dp} = {unit}; use for example {up}"
            )
        zero_stage = (1 if dp > 1 else 0) if p.zero_stage == "auto" else p.zero_stage
        dims = cls(tp=p.tp, pp=p.pp, dp=dp, vpp=p.vpp, sequence_parallel=sequence_parallel, zero_stage=zero_stage)
        most = m.num_layers + 1 - least_layers(config)  # the head may be a chunk of its own
        if most < dims.num_chunks:
            raise UserError(
                f"model.num_layers {m.num_layers} is too few for parallel.pp {p.pp} x parallel.vpp {p.vpp} = "
                f"{dims.num_chunks} chunks; use at most {most}"
            )
        if p.vpp > 1 and dims.micro_batches(config) % p.pp:
            raise UserError(
                f"the interleaved schedule needs a multiple of parallel.pp {p.pp} micro-batches, and there are "
                f"{dims.micro_batches(config)}; change train.global_batch_size or train.micro_batch_size, or use vpp=1"
            )
        return dims

    @classmethod
    def _fits(cls, config: Config, tp: int, pp: int, world_size: int) -> bool:
        parallel = config.parallel.model_copy(update={"tp": tp, "pp": pp})
        if (pp > 1 and parallel.zero_stage in (2, 3)) or (pp == 1 and parallel.vpp > 1):
            return False
        try:
            cls.build(config.model_copy(update={"parallel": parallel}), world_size)
        except UserError:
            return False
        return True


def check_vocabulary(config: Config) -> None:
    """UserError if a softmax model's vocabulary cannot be split over TP; nothing if it is not known yet."""
    m, tp = config.model, config.parallel.tp
    if m.head.kind == "softmax" and m.vocab_size is not None and m.padded_vocab_size % tp:
        allowed = [d for d in divisors(m.padded_vocab_size) if d <= 64]
        raise UserError(
            f"the vocabulary of {m.vocab_size} tokens, padded to {m.padded_vocab_size}, cannot be split over "
            f"parallel.tp {tp}; tp may be one of {allowed}"
        )


def divisors(n: int) -> list[int]:
    """All of them, ascending; in the time of the root of n."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d != n]
