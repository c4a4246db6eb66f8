"""`bench quality --tokens`: one run a rung, read at several budgets, and what the curve through them says.

The learning rate stays up (`optim.schedule=wsd`), and each budget has its own short decay, on a copy of the run (Hu et
al., MiniCPM, arXiv 2404.06395; Haegele et al., arXiv 2405.18392): a budget costs its last fifth beside what the largest
one costs. A copy that has decayed is to the bit the run of that budget alone.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
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


def parse_count(text: str, option: str) -> int:
    """'0.4M' to 400,000. UserError, which names the option, if it is no number."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)([kMG]?)", text, re.ASCII)
    count = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not count:
        raise UserError(f"{option} {text} is no number; write for example 400k, 2M or 8200000")
    return count


def budgets(tokens: Sequence[str], per_step: int, warmup: int) -> list[int]:
    """Steps of each budget, ascending. UserError: one too short to warm up before it decays, or two that are one."""
    steps = sorted(round(parse_count(text, "--tokens") / per_step) for text in tokens)
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
    """nats = limit + sum over x of scale * x ** -power, where x are millions of tokens and perhaps of parameters."""

    limit: float
    terms: dict[str, tuple[float, float]]  # of T, and perhaps N: scale and power
    error: float  # root of the mean square of what it leaves, nats

    def __str__(self) -> str:
        terms = "".join(f" + {scale:.2f} {x}^-{power:.2f}" for x, (scale, power) in self.terms.items())
        return f"{self.limit:.2f}{terms} (+- {self.error:.3f})"


def fit(tokens: Sequence[float], nats: Sequence[float]) -> Law | None:
    """Least squares, the limit not below 0; None for fewer than LEAST_POINTS budgets."""
    return _fit({"T": tokens}, nats) if len({*tokens}) >= LEAST_POINTS else None


def fit_sizes(parameters: Sequence[float], tokens: Sequence[float], nats: Sequence[float]) -> Law | None:
    """The law of both (Hoffmann et al., arXiv 2203.15556, equation 2); None for fewer than three sizes or budgets."""
    enough = len({*parameters}) >= 3 and len({*tokens}) >= 3
    return _fit({"N": parameters, "T": tokens}, nats) if enough else None


def _fit(variables: dict[str, Sequence[float]], nats: Sequence[float]) -> Law:
    """All powers of a grid are tried; the scales are linear then."""
    y, best = np.asarray(nats, float), None
    columns = [np.asarray(values, float) / 1e6 for values in variables.values()]
    for powers in itertools.product(np.linspace(0.02, 1.5, 149 if len(columns) == 1 else 75), repeat=len(columns)):
        falling = np.stack([x**-power for x, power in zip(columns, powers, strict=True)], axis=1)
        basis = np.concatenate((np.ones((len(y), 1)), falling), axis=1)
        found = np.linalg.lstsq(basis, y, rcond=None)[0]
        if found[0] < 0.0:
            found = np.concatenate(([0.0], np.linalg.lstsq(falling, y, rcond=None)[0]))
        error = float(np.sqrt(np.mean((basis @ found - y) ** 2)))
        if best is None or error < best.error:
            terms = {x: (float(a), float(p)) for x, a, p in zip(variables, found[1:], powers, strict=True)}
            best = Law(float(found[0]), terms, error)
    assert best is not None
    return best
