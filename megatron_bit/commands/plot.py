"""`megatron-bit plot`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from megatron_bit.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_bit.run.curves import Curves

FORMATS = (".png", ".svg", ".pdf")


def plot(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")],
    out: Path = Path("curves.png"),
    x: Literal["tokens", "steps"] = "tokens",
    nats: tuple[float, float] | None = None,
) -> int:
    """Draw training and validation curves of runs into one picture, without a server.

    The training curve is the mean over the steps of a point; validation has its standard error. Needs matplotlib.

    Args:
        runs: run folders, or folders that hold them, such as a sweep.
        out: picture to write; its ending says the format: .png, .svg or .pdf.
        x: what is on the x axis.
        nats: lowest and highest value that is shown; default what the curves have, without the first tenth.
    """
    from mbit_launcher.status import find_some

    from megatron_bit.run.curves import read_curves

    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {out} has to end in {', '.join(FORMATS)}")
    if nats is not None and not nats[0] < nats[1]:
        raise UserError(f"--nats {nats[0]:g} {nats[1]:g}: give the lower one first")
    folders = [run for folder in runs for run in find_some(folder)]
    curves = [one for one in map(read_curves, dict.fromkeys(folders)) if one.train or one.validation]
    if not curves:
        raise UserError(f"{', '.join(map(str, runs))}: no run has done a step yet")
    _draw(curves, out, x, nats)
    print(f"{out}: {len(curves)} run{'s' * (len(curves) > 1)}")
    return 0


def _draw(curves: Sequence[Curves], out: Path, x: str, nats: tuple[float, float] | None) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("plot needs matplotlib: pip install 'megatron-bit[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    at = 0 if x == "tokens" else 1
    common = os.path.commonpath([str(one.run.parent) for one in curves])
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for one in curves:
        name = os.path.relpath(one.run, common)
        line = None
        if one.train:
            line = axes.plot([p[at] for p in one.train], [p[2] for p in one.train], alpha=0.5, linewidth=1)[0]
        if one.validation:
            places, values, errors = ([p[i] for p in one.validation] for i in (at, 2, 3))
            color = None if line is None else line.get_color()
            axes.errorbar(places, values, errors, marker="o", markersize=3, color=color, label=f"{name}, validation")
            name += ", training"
        if line is not None:
            line.set_label(name)
    if nats is None and (seen := sorted(p[2] for one in curves for p in one.train[len(one.train) // 10 :])):
        margin = 0.05 * (seen[-1] - seen[0]) + 1e-3
        lowest = min([seen[0], *(p[2] for one in curves for p in one.validation)])
        nats = (lowest - margin, seen[-1] + margin)
    if nats is not None:
        axes.set_ylim(*nats)
    axes.set_xlabel(x)
    axes.set_ylabel("nats/token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    try:
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from None
    pyplot.close(figure)
