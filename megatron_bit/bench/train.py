"""`megatron-bit bench train`: speed and memory of training, BitLM against softmax heads and megatron-core's GPTModel.

One process. All are built at once and take their steps in turn, so that a noisy machine is noisy for all of them.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from megatron_bit.bench.gpt_peer import GPTPeer, with_transformer_engine
from megatron_bit.bench.machine import machine
from megatron_bit.bench.saved import Saved
from megatron_bit.bench.spread import spread
from megatron_bit.config import Config
from megatron_bit.errors import UserError
from megatron_bit.model.build import build_model
from megatron_bit.model.chunk import TokenBatch
from megatron_bit.optim.build import build_optimizer
from megatron_bit.optim.optimizer import Optimizer
from megatron_bit.parallel import groups as process_groups
from megatron_bit.parallel import mcore
from megatron_bit.parallel.groups import Groups
from megatron_bit.parallel.split import train_flops
from megatron_bit.planning.hardware import peak_flops
from megatron_bit.training.step import forward_backward

EOS = 0
OURS, PEER = "BitLM", "GPTModel"


@dataclass
class Contestant:
    """A model and its optimizer, and what was measured of it."""

    name: str
    config: Config
    optimizer: Optimizer
    batches: list[TokenBatch]
    parameters: int
    held: int  # bytes of device memory that weights and optimizer take; 0 on a CPU
    seconds: list[float] = field(default_factory=list)  # a step, of every stretch
    peak: float = 0.0  # bytes: on a GPU all of its memory at the highest, on a CPU what autograd keeps

    def steps(self, count: int, groups: Groups) -> None:
        for _ in range(count):
            forward_backward(self.batches, self.optimizer, groups)
            self.optimizer.step([1e-4] * len(self.optimizer.base.param_groups))
        if groups.device.type == "cuda":
            torch.cuda.synchronize()


def main(
    configs: Sequence[Config],
    variants: Sequence[Mapping[str, Config]],
    vocab_sizes: Sequence[int],
    steps: int,
    repeats: int,
    as_json: bool,
) -> int:
    """Time all contestants of every configuration (which differ in `train.precision`); print medians and ratios.

    variants: of each configuration, others of a BitLM by what they are called.
    """
    mcore.prepare(fused=True)
    groups = process_groups.init(configs[0])
    try:
        contestants, left_out = _contestants(configs, variants, vocab_sizes, groups)
        for contestant in contestants:
            _measure_memory(contestant, groups)
        for repeat in range(repeats + 1):
            for contestant in contestants if repeat % 2 else contestants[::-1]:
                begin = time.perf_counter()
                contestant.steps(steps, groups)
                if repeat:  # the first of each warms up
                    contestant.seconds.append((time.perf_counter() - begin) / steps)
    finally:
        process_groups.shutdown()
    result = _result(contestants, left_out, configs[0], steps, groups)
    print(json.dumps(result, indent=1) if as_json else _table(result))
    return 0


def _contestants(
    configs: Sequence[Config], variants: Sequence[Mapping[str, Config]], vocab_sizes: Sequence[int], groups: Groups
) -> tuple[list[Contestant], list[str]]:
    """Those that can be built, and why others cannot."""
    contestants, left_out = [], []
    for config, others in zip(configs, variants, strict=True):
        for name, bitlm in {OURS: config, **others}.items():
            contestants.append(build_contestant(name, bitlm, min(2**bitlm.model.bits, 2**20), groups))
        for vocab_size in vocab_sizes:
            peer = _softmax(config, vocab_size)
            contestants.append(build_contestant(f"softmax {vocab_size:,}", peer, vocab_size, groups))
        peer = _softmax(config, vocab_sizes[0])
        try:
            contestants.append(build_contestant(f"{PEER} {vocab_sizes[0]:,}", peer, vocab_sizes[0], groups, gpt=True))
        except UserError as error:
            left_out.append(str(error))
    return contestants, left_out


def _softmax(config: Config, vocab_size: int) -> Config:
    """The same backbone between a token table and a softmax over the vocabulary."""
    head = config.model.head.model_copy(update={"kind": "softmax"})
    model = config.model.model_copy(update={"head": head, "block_size": 1, "vocab_size": vocab_size})
    diffusion = config.diffusion.model_copy(update={"self_condition": 0.0})
    return config.model_copy(update={"model": model, "diffusion": diffusion})


def build_contestant(name: str, config: Config, vocab_size: int, groups: Groups, gpt: bool = False) -> Contestant:
    """A model with optimizer and random batches; UserError if it cannot be built."""
    before = _allocated(groups)
    model: nn.Module = GPTPeer(config, groups) if gpt else build_model(config, vocab_size, groups, EOS)[0]
    optimizer = build_optimizer(config, [model], groups)
    size = (config.train.micro_batch_size, config.data.seq_length)
    batches = [
        TokenBatch(
            torch.randint(0, vocab_size, size, device=groups.device), torch.arange(size[0], device=groups.device)
        )
        for _ in range(groups.dims.micro_batches(config))
    ]
    parameters = sum(p.numel() for p in model.parameters())
    return Contestant(name, config, optimizer, batches, parameters, _allocated(groups) - before)


def _allocated(groups: Groups) -> int:
    return torch.cuda.memory_allocated() if groups.device.type == "cuda" else 0


def _measure_memory(contestant: Contestant, groups: Groups) -> None:
    """One step. On a GPU all that it allocates, with what it holds anyway; on a CPU what autograd keeps."""
    if groups.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contestant.steps(1, groups)
        contestant.peak = contestant.held + torch.cuda.max_memory_allocated() - before
        return
    saved = Saved(p for chunk in contestant.optimizer.chunks for p in chunk.parameters())
    with saved:
        contestant.steps(1, groups)
    contestant.peak = saved.peak


def _result(
    contestants: Sequence[Contestant], left_out: list[str], config: Config, steps: int, groups: Groups
) -> dict[str, Any]:
    gpu = groups.device.type == "cuda"
    device = torch.cuda.get_device_name() if gpu else platform.machine()
    peak = peak_flops(device) if gpu else None
    tokens = config.train.global_batch_size * config.data.seq_length
    peers = {c.config.train.precision: c for c in contestants if c.name.startswith(PEER)}
    ours = {c.config.train.precision: c for c in contestants if c.name == OURS}
    rows = []
    for c in contestants:
        flops, peer = train_flops(c.config), peers.get(c.config.train.precision)
        rows.append(
            {
                "precision": c.config.train.precision,
                "model": c.name,
                "parameters": c.parameters,
                "flops_per_token": flops,
                "tokens_per_second": spread([tokens / s for s in c.seconds]),
                "model_flops_per_second": spread([flops * tokens / s for s in c.seconds]),
                "mfu": spread([flops * tokens / s / peak for s in c.seconds]) if peak else None,
                f"times {PEER}": _times(c, peer) if peer else None,
                f"times {OURS}": _times(c, ours[c.config.train.precision]),
                "peak_memory_bytes" if gpu else "kept_by_autograd_bytes": c.peak,
            }
        )
    m, t = config.model, config.train
    return {
        "machine": machine(device),
        "model": f"{m.num_layers} layers of {m.hidden_size}, K={m.block_size}, {m.head.kind} head, {m.bits} bits; "
        f"{t.global_batch_size} x {config.data.seq_length} tokens a step in micro-batches of {t.micro_batch_size}, "
        f"random tokens; {steps} steps a stretch",
        "peer": f"{PEER} with " + ("Transformer Engine's layers" if with_transformer_engine() else "its local spec"),
        "left_out": left_out,
        "variants": sorted({c.name for c in contestants if c.config.model.head.kind != "softmax"} - {OURS}),
        "rows": rows,
    }


def _times(one: Contestant, other: Contestant) -> dict[str, float]:
    """How many times as fast `one` is, stretch by stretch."""
    return spread([theirs / mine for mine, theirs in zip(one.seconds, other.seconds, strict=True)])


def _table(result: dict[str, Any]) -> str:
    gpu = "peak_memory_bytes" in result["rows"][0]
    speed, memory = ("MFU, %", "peak, MiB") if gpu else ("GFLOP/s", "kept, MiB")
    lines = [result["machine"], result["model"], result["peer"], *result["left_out"], ""]
    wide = max(18, *(len(row["model"]) for row in result["rows"]))
    others = [PEER, OURS] if result["variants"] else [PEER]
    times = "".join(f" {f'times {other}':>20}" for other in others)
    lines.append(f"{'':12} {'model':{wide}} {'parameters':>14} {'tokens/s':>26}{times} {speed:>9} {memory:>10}")
    for row in result["rows"]:
        rate, ratios = row["tokens_per_second"], [row[f"times {other}"] for other in others]
        rates = f"{rate['median']:.0f} ({rate['min']:.0f}-{rate['max']:.0f})"
        told = [f"{r['median']:.3f} ({r['min']:.3f}-{r['max']:.3f})" if r else "n/a" for r in ratios]
        if gpu:
            used = f"{100 * row['mfu']['median']:.1f}" if row["mfu"] else "n/a"
        else:
            used = f"{row['model_flops_per_second']['median'] / 1e9:.1f}"
        size = row["peak_memory_bytes" if gpu else "kept_by_autograd_bytes"] / 2**20
        lines.append(
            f"{row['precision']:12} {row['model']:{wide}} {row['parameters']:14,} {rates:>26}"
            f"{''.join(f' {text:>20}' for text in told)} {used:>9} {size:10.1f}"
        )
    return "\n".join(lines)
