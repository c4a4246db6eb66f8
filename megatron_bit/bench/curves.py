"""`bench quality --tokens`: one run a rung, read at several budgets, and what the curve through them says.

The learning rate stays up (`optim.schedule=wsd`), and each budget has its own short decay, on a copy of the run (Hu et
al., MiniCPM, arXiv 2404.06395; Haegele et al., arXiv 2405.18392): a budget costs its last fifth beside what the largest
one costs. A copy that has decayed is to the bit the run of that budget alone.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_bit.errors import UserError
from megatron_bit.optim.schedule import decay_begin

DECAY = 0.2  # of a budget, over which its learning rate falls
SETTINGS = ("optim.schedule=wsd", f"optim.decay_fraction={DECAY}")
LEAST_POINTS = 4  # a law of three numbers through fewer says nothing
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}

Command = Callable[[Sequence[str], Path], object]  # (words of `megatron-bit`, the run whose failure it would be)


def parse_tokens(text: str) -> int:
    """'0.4M' to 400,000. UserError if it is no number of tokens."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)([kMG]?)", text, re.ASCII)
    tokens = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not tokens:
        raise UserError(f"--tokens {text} is no number of tokens; write for example 400k, 2M or 8200000")
    return tokens


def budgets(tokens: Sequence[str], per_step: int, warmup: int) -> list[int]:
    """Steps of each budget, ascending. UserError: one too short to warm up before it decays, or two that are one."""
    steps = sorted(round(parse_tokens(text) / per_step) for text in tokens)
    if len({*steps}) < len(steps):
        raise UserError(f"--tokens {' '.join(tokens)} are of {steps} steps of {per_step:,} tokens; two are the same")
    if decay_begin(steps[0], DECAY) <= warmup:
        least = math.ceil((warmup + 1) / (1 - DECAY)) + 1
        raise UserError(
            f"--tokens: {steps[0]} steps of {per_step:,} tokens end in their warm-up of {warmup}; take at least "
            f"{least * per_step:,} tokens"
        )
    return steps


def train(arguments: Sequence[str], steps: Sequence[int], folder: Path, call: Command) -> dict[int, Path]:
    """Train what is not there yet.

    Args:
        arguments: of `train`, without a run and steps.
        steps: budgets, ascending.
        folder: of the run; that of a budget has its steps behind its name.

    Returns:
        the finished run of each budget.
    """
    runs = {budget: folder.with_name(f"{folder.name}-{budget}") for budget in steps}
    most = steps[-1]
    for budget, run in runs.items():
        if not run.exists():
            stop = f"train.stop_at={decay_begin(budget, DECAY)}"
            every = (f"evaluate.every={most}", f"checkpoint.every={max(1, most // 20)}", "checkpoint.keep=1")
            call(["train", *arguments, f"run={folder}", f"train.steps={most}", *every, stop], folder)
            _copy(folder, run)
        if not (run / "FINISHED").exists():
            ends = (f"train.steps={budget}", f"evaluate.every={budget}", f"checkpoint.every={budget}")
            call(["train", str(run), *ends, "train.stop_at=null"], run)
    return runs


def _copy(run: Path, to: Path) -> None:
    """All of it under another name, or nothing."""
    temporary = to.with_name(f"{to.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(run, temporary)
    os.rename(temporary, to)


@dataclass(frozen=True)
class Law:
    """nats = limit + scale * (tokens / 1e6) ** -power."""

    limit: float
    scale: float
    power: float
    error: float  # root of the mean square of what it leaves, nats


def fit(tokens: Sequence[float], nats: Sequence[float]) -> Law | None:
    """Least squares, the limit not below 0; None for fewer than LEAST_POINTS budgets."""
    if len(tokens) < LEAST_POINTS:
        return None
    x, y, best = np.asarray(tokens, float) / 1e6, np.asarray(nats, float), None
    for power in np.linspace(0.02, 1.5, 149):
        basis = np.stack((np.ones_like(x), x**-power), axis=1)
        limit, scale = np.linalg.lstsq(basis, y, rcond=None)[0]
        if limit < 0.0:
            limit, scale = 0.0, float(basis[:, 1] @ y / (basis[:, 1] @ basis[:, 1]))
        error = float(np.sqrt(np.mean((limit + scale * basis[:, 1] - y) ** 2)))
        if best is None or error < best.error:
            best = Law(float(limit), float(scale), float(power), error)
    return best


def table(points: dict[str, dict[int, list[float]]], flops: dict[str, float], peer: str) -> list[str]:
    """Markdown: nats of every rung at every budget, and how far it is from the peer there.

    Args:
        points: of a rung and a budget in tokens the nats of each seed.
        flops: of training, of a rung for a token.
    """
    every = sorted({tokens for of_rung in points.values() for tokens in of_rung})
    means = {name: {t: statistics.mean(v) for t, v in of_rung.items()} for name, of_rung in points.items()}
    heads = [f"{tokens / 1e6:g} M | minus AR" for tokens in every]
    lines = [f"| rung | {' | '.join(heads)} | PFLOP of the last | law |", "|---" * (2 * len(every) + 3) + "|"]
    for name, of_rung in means.items():
        cells = []
        for tokens in every:
            value, base = of_rung.get(tokens), means.get(peer, {}).get(tokens)
            gap = "" if value is None or base is None or name == peer else f"{value - base:+.3f}"
            cells.append(f"{'' if value is None else f'{value:.3f}'} | {gap}")
        law = fit([*of_rung], [*of_rung.values()])
        said = "" if law is None else f"{law.limit:.2f} + {law.scale:.2f} T^-{law.power:.2f} (+- {law.error:.3f})"
        lines.append(f"| {name} | {' | '.join(cells)} | {max(of_rung) * flops[name] / 1e15:.3g} | {said} |")
    return [*lines, "", "Law: nats of T million tokens, with the root of the mean square that it leaves."]
