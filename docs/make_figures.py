"""Draws docs/img/*.svg with nothing but Python: `.venv/bin/python docs/make_figures.py`.

Each picture brings its own background and a dark variant (prefers-color-scheme), so that it is legible on any page.
`--dark FOLDER` writes the dark variant as the only one, to look at it in a viewer that knows no media queries.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from xml.sax.saxutils import escape

from megatron_bit.config import load_config
from megatron_bit.planning.dry_run import describe

LIGHT = {
    "page": "#ffffff", "ink": "#1b1f24", "soft": "#57606a", "line": "#57606a",
    "data": "#ddf4ff", "model": "#e6ffec", "noise": "#fff3d6", "loss": "#ffe3e6", "plain": "#f3f4f6",
}  # fmt: skip
DARK = {
    "page": "#0d1117", "ink": "#e6edf3", "soft": "#9aa5b1", "line": "#8b949e",
    "data": "#12324a", "model": "#12361f", "noise": "#4a3a10", "loss": "#4c1d24", "plain": "#21262d",
}  # fmt: skip


def _rules(colours: dict[str, str]) -> str:
    fills = "".join(f".{name}{{fill:{value};stroke:{colours['line']}}}" for name, value in colours.items())
    return (
        fills
        + f".page{{stroke:none}}.ink{{stroke:none}}.soft{{stroke:none}}.line{{stroke:{colours['line']};fill:none}}"
        f".tip{{fill:{colours['line']};stroke:none}}"
    )


class Picture:
    """Boxes, labels and arrows in pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.parts: list[str] = []

    def label(self, x: float, y: float, text: str, kind: str = "ink", size: int = 13, anchor: str = "middle") -> None:
        mono = "ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace"
        family = mono if kind == "soft" else "system-ui,'DejaVu Sans',sans-serif"
        self.parts.append(
            f'<text x="{x}" y="{y}" class="{kind}" font-size="{size}" text-anchor="{anchor}" '
            f'font-family="{family}">{escape(text)}</text>'
        )

    def box(self, x: float, y: float, w: float, h: float, kind: str, *lines: str) -> None:
        """The first line is the name; the others are small and monospaced (shapes, files)."""
        self.parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" class="{kind}"/>')
        top = y + h / 2 - 8 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            self.label(x + w / 2, top + 16 * number, line, "soft" if number else "ink", 11 if number else 13)

    def arrow(self, *points: tuple[float, float], both: bool = False) -> None:
        """Straight pieces; a tip at the end, and at the start too if `both`."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" class="line" stroke-width="1.6"/>')
        ends = [(points[-2], points[-1])] + ([(points[1], points[0])] if both else [])
        for (x0, y0), (x1, y1) in ends:
            dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
            left, right = (x1 - 8 * dx - 4 * dy, y1 - 8 * dy + 4 * dx), (x1 - 8 * dx + 4 * dy, y1 - 8 * dy - 4 * dx)
            tip = " ".join(f"{x},{y}" for x, y in ((x1, y1), left, right))
            self.parts.append(f'<polygon points="{tip}" class="tip"/>')

    def svg(self, dark_only: bool) -> str:
        style = _rules(DARK) if dark_only else f"{_rules(LIGHT)}@media (prefers-color-scheme:dark){{{_rules(DARK)}}}"
        w, h = self.size
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}">'
            f'<style>{style}</style><rect width="{w}" height="{h}" rx="8" class="page"/>'
            + "".join(self.parts)
            + "</svg>\n"
        )


def data_flow() -> Picture:
    """Three blocks of K = 4 tokens through the model, then the parts with their shapes."""
    p = Picture(900, 590)
    cell, left = 56, 186
    rows = {"input": 34, "backbone": 92, "target": 150}
    for index in range(12):
        x = left + index * cell + 8 * (index // 4)
        start = index < 4
        name = f"s{'₀₁₂₃'[index]}" if start else f"t{_sub(index - 4)}"
        p.box(x, rows["input"], cell - 6, 30, "plain" if start else "data", name)
        p.box(x, rows["target"], cell - 6, 30, "loss", f"t{_sub(index)}")
    for block in range(3):
        x = left + block * (4 * cell + 8)
        middle = x + 2 * cell - 3
        p.box(x, rows["backbone"], 4 * cell - 6, 30, "model", f"states h of block {block}")
        p.arrow((middle, rows["input"] + 30), (middle, rows["backbone"]))
        p.arrow((middle, rows["backbone"] + 30), (middle, rows["target"]))
        if block:
            p.arrow((x - 14, rows["backbone"] + 15), (x, rows["backbone"] + 15))
    for row, text in (("input", "input bits"), ("backbone", "causal backbone"), ("target", "head denoises")):
        p.label(left - 14, rows[row] + 20, text, anchor="end")
    p.label(
        450, 206, "the input is one block behind (s: learned start vectors), so no state has seen its target", size=12
    )

    x, w, h = 30, 196, 52
    p.box(x, 236, w, h, "data", "shards", "data/stream.py", "int tokens, tar files")
    p.box(x, 324, w, h, "data", "batches", "data/order.py, batches.py", "tokens [b, S], sample [b]")
    p.box(x, 412, w, h, "data", "bits", "model/codec.py, table V x B", "x = ±1 [S, b, B]")
    p.arrow((x + w / 2, 288), (x + w / 2, 324))
    p.arrow((x + w / 2, 376), (x + w / 2, 412))
    middle = 342
    p.box(middle, 412, w + 20, h, "model", "bit embedding (MLP)", "model/embedding.py", "first stage  [S, b, D]")
    p.box(
        middle, 324, w + 20, h, "model", "TransformerBlock", "model/backbone.py, attention.py", "TP, SP, PP  [S, b, D]"
    )
    p.box(middle, 236, w + 20, h, "noise", "noise", "diffusion/noise.py, philox.py", "eps [S,b,M,B], ln σ [S/K,b,M]")
    p.arrow((x + w, 438), (middle, 438))
    p.label((x + w + middle) / 2, 430, "K behind", size=11)
    p.arrow((middle + 108, 412), (middle + 108, 376))
    p.arrow((x + w, 344), (284, 344), (284, 262), (middle, 262))
    p.label(288, 254, "sample", size=11)
    last = 672
    p.box(last, 324, w, h, "model", "denoising head", "model/head.py  last stage", "residual f [S, b, M, B]")
    p.arrow((middle + w + 20, 350), (last, 350))
    p.label((middle + w + 20 + last) / 2, 342, "h  [S, b, D]", size=11)
    p.arrow((middle + w + 20, 262), (last + w / 2, 262), (last + w / 2, 324))
    p.label(last - 50, 254, "z = x + σ eps", size=11)
    p.box(last, 412, w, h, "loss", "matched filter, loss", "diffusion/loss.py", "f + clip(2z / σ²)  →  scalar")
    p.arrow((last + w / 2, 376), (last + w / 2, 412))
    p.arrow((x + w / 2, 464), (x + w / 2, 496), (last + w / 2, 496), (last + w / 2, 464))
    p.label(450, 490, "x, not shifted: the target", size=11)
    p.box(342, 522, 526, 48, "plain", "backward by the schedule  →  ZeRO step", "training/step.py  →  optim/zero.py")
    p.arrow((last + w, 438), (last + w + 16, 438), (last + w + 16, 546), (868, 546))
    return p


def _sub(number: int) -> str:
    return "".join("₀₁₂₃₄₅₆₇₈₉"[int(digit)] for digit in str(number))


def layout() -> Picture:
    """Eight ranks as TP 2 x PP 2 x DP 2, with the 125m preset's own split of layers."""
    overrides = ["parallel.tp=2", "parallel.pp=2"]
    plan = describe(load_config(preset="125m", overrides=overrides), 8)
    p = Picture(900, 486)
    for stage, chunk in enumerate(plan["layout"]["chunks"]):
        x = 100 + stage * 430
        p.label(x + 165, 30, f"pipeline stage {stage}: {chunk['holds']}")
        for replica in range(2):
            y = 48 + replica * 190
            p.box(x, y, 330, 108, "plain")
            for tp in range(2):
                rank = stage * 4 + replica * 2 + tp
                p.box(
                    x + 12 + tp * 196, y + 14, 110, 80, "model" if stage == 0 else "loss",
                    f"rank {rank}", f"weights: half {tp}", f"ZeRO-1:  half {replica}",
                )  # fmt: skip
            p.arrow((x + 122, y + 54), (x + 208, y + 54), both=True)
            p.label(x + 165, y + 46, "TP", size=12)
            p.label(x + 165, y + 72, "each layer", "soft", 11)
    for replica in range(2):
        y = 48 + replica * 190
        p.arrow((430, y + 54), (530, y + 54), both=True)
        p.label(480, y + 46, "PP", size=12)
        p.label(480, y + 72, "each", "soft", 11)
        p.label(480, y + 86, "micro-batch", "soft", 11)
        p.label(50, y + 50, f"DP {replica}", size=13)
        p.label(50, y + 68, "its samples", "soft", 11)
    for stage in range(2):
        for tp in range(2):
            x = 100 + stage * 430 + 67 + tp * 196
            p.arrow((x, 156), (x, 238), both=True)
        p.label(100 + stage * 430 + 165, 194, "DP", size=12)
        p.label(100 + stage * 430 + 165, 210, "once a step", "soft", 11)
    notes = (
        "each rank: half of its stage's matrices (TP), and fp32 masters and moments for half of those (ZeRO-1 over DP)",
        "TP  all-gather and reduce-scatter of [S, b, D] along the sequence (SP), around every attention and MLP",
        "PP  hidden state [S/2, b, D] forward, its gradient back; point to point, rank r with r + 4",
        "DP  average of the gradients, every rank updates its half, the halves are gathered; rank r with r + 2",
        "all ranks: one all-reduce of 3 floats a step (loss, bound, asked to stop), and the gradient norm",
    )
    for number, note in enumerate(notes):
        p.label(28, 382 + 22 * number, note, size=13, anchor="start")
    return p


def quality() -> Picture | None:
    """Every rung of docs/quality.json as a bar from the softmax peer; several seeds are a mean, with a dot for each."""
    source = Path(__file__).parent / "quality.json"
    if not source.exists():
        return None
    nats: dict[str, list[float]] = {}
    for result in json.loads(source.read_text())["results"]:
        nats.setdefault(result["rung"], []).append(result["nats"])
    peer = sum(nats["AR softmax"]) / len(nats["AR softmax"])
    rows = [(name, values) for name, values in nats.items() if name != "AR softmax"]
    p = Picture(900, 76 + 19 * len(rows))
    gaps = [value - peer for _, values in rows for value in values]
    low, high = min(0.0, *gaps), max(gaps)
    left, right = 400, 840

    def x(gap: float) -> float:
        return round(left + (gap - low) / (high - low) * (right - left), 1)

    p.label(450, 24, f"nats per token more than the softmax peer ({peer:.3f}); less is better")
    for number, (name, values) in enumerate(rows):
        y, gap = 44 + 19 * number, sum(values) / len(values) - peer
        kind = "model" if name.startswith("chain") else "noise"
        begin, end = sorted((x(0.0), x(gap)))
        p.label(min(x(min(0.0, low)), left) - 10, y + 11, name, size=12, anchor="end")
        p.box(begin, y, max(end - begin, 1.0), 14, kind)
        p.parts.extend(
            f'<circle cx="{x(v - peer)}" cy="{y + 7}" r="2.5" class="tip"/>' for v in values if len(values) > 1
        )
        p.label(max(end, x(0.0)) + 8, y + 11, f"{gap:+.2f}", "soft", 11, anchor="start")
    bottom = 44 + 19 * len(rows)
    p.parts.append(f'<polyline points="{x(0.0)},36 {x(0.0)},{bottom}" class="line" stroke-width="1.2"/>')
    p.label(450, bottom + 20, "green: chain; yellow: joint diffusion; dots: seeds", "soft", 11)
    return p


def curves() -> Picture:
    """Every curve of docs/curves.json over tokens: nats, and how far they are from the peer that is alike."""
    found = json.loads((Path(__file__).parent / "curves.json").read_text())
    lines = {curve["rung"]: dict(map(tuple, curve["points"])) for curve in found["curves"]}
    peers = {curve["rung"]: lines[found["peer"][curve["peer"]]] for curve in found["curves"]}
    gaps = {
        name: {t: nats - peers[name][t] for t, nats in points.items() if t in peers[name]}
        for name, points in lines.items() if name not in found["peer"].values()
    }  # fmt: skip
    ticks = sorted({t for points in lines.values() for t in points})
    p, dashes = Picture(900, 400), dict(zip(lines, ("", "7 4", "2 3", "12 3 2 3", "4 2"), strict=True))
    for left, what, drawn in ((70, "nats per token", lines), (520, "nats per token more than the peer alike", gaps)):
        values = [v for points in drawn.values() for v in points.values()]
        low, high = min(values), max(values)

        def place(tokens: float, value: float, left: int = left, low: float = low, high: float = high) -> str:
            x = left + 330 * math.log(tokens / ticks[0]) / math.log(ticks[-1] / ticks[0])
            return f"{x:.1f},{40 + 220 * (high - value) / (high - low):.1f}"

        p.label(left + 165, 24, what)
        for name, points in drawn.items():
            path = " ".join(place(*point) for point in sorted(points.items()))
            p.parts.append(
                f'<polyline points="{path}" class="line" stroke-width="1.8" stroke-dasharray="{dashes[name]}"/>'
            )
            for point in points.items():
                x, y = place(*point).split(",")
                p.parts.append(f'<circle cx="{x}" cy="{y}" r="2.5" class="tip"/>')
                if drawn is gaps:
                    p.label(float(x), float(y) - 6, f"{point[1]:+.2f}", "soft", 10)
        for value in (0.0,) if drawn is gaps else (3.0, 3.5, 4.0):
            y = place(ticks[0], value).split(",")[1]
            p.parts.append(f'<polyline points="{left - 10},{y} {left + 340},{y}" class="line" stroke-width="0.4"/>')
            p.label(left - 16, float(y) + 4, f"{value:g}", "soft", 11, anchor="end")
        for tokens in ticks:
            p.label(float(place(tokens, low).split(",")[0]), 286, f"{tokens:g} M", "soft", 11)
    p.label(450, 304, f"tokens; {found['parameters'] / 1e6:.2f} M parameters outside of tables", "soft", 11)
    for number, (name, dash) in enumerate(dashes.items()):
        x, y = (70, 520)[number % 2], 328 + 20 * (number // 2)
        p.parts.append(
            f'<polyline points="{x},{y} {x + 40},{y}" class="line" stroke-width="1.8" stroke-dasharray="{dash}"/>'
        )
        p.label(x + 50, y + 4, name, size=12, anchor="start")
    return p


def steps() -> Picture:
    """Every line of docs/steps.json: nats of generated text over evaluations of the head a block."""
    found = json.loads((Path(__file__).parent / "steps.json").read_text())
    p, left, right, top, bottom = Picture(900, 380), 80, 660, 30, 320
    dashes = {"chain": ("", "7 4", "2 3", "12 3 2 3"), "joint": ("", "7 4", "2 3")}
    low, high, most = 3.0, 9.4, 32

    def place(count: float, nats: float) -> tuple[float, float]:
        x = left + (right - left) * math.log(count / 4) / math.log(most / 4)
        return round(x, 1), round(top + (bottom - top) * (high - nats) / (high - low), 1)

    def line(*points: tuple[float, float], width: float, dash: str = "") -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        p.parts.append(f'<polyline points="{path}" class="line" stroke-width="{width}" stroke-dasharray="{dash}"/>')

    p.label(left - 10, 20, "nats per token of generated text, under AR", anchor="start")
    for name in ("real text", "AR's own"):
        y = place(4, found[name])[1]
        line((left, y), (right, y), width=0.6, dash="1 2")
        p.label(right + 6, y + (9 if name == "real text" else -1), f"{name} {found[name]:.2f}", "soft", 11, "start")
    seen: dict[str, int] = {}
    for one in found["lines"]:
        kind, points = one["kind"], [place(*point) for point in one["points"]]
        dash = dashes[kind][seen.setdefault(kind, 0)]
        seen[kind] += 1
        line(*points, width=2.4 if kind == "chain" else 1.2, dash=dash)
        for x, y in points:
            p.parts.append(f'<circle cx="{x}" cy="{y}" r="3" class="tip"/>')
        x, y = points[-1]
        below = {"joint, em": 8, "joint, churn": 20, "front of all": 18}.get(one["name"], 4)
        p.label(x + 10, y + below, one["name"], size=12, anchor="start")
    for value in range(4, 10):
        p.label(left - 16, place(4, value)[1] + 4, f"{value}", "soft", 11, anchor="end")
    for count in (4, 6, 8, 16, 32):
        p.label(place(count, low)[0], bottom + 20, f"{count}", "soft", 11)
    p.label(
        (left + right) / 2,
        bottom + 42,
        "evaluations of the head a block of 4 tokens (8 groups); thick: a chain, thin: joint diffusion",
        "soft",
        11,
    )
    return p


def main() -> None:
    dark = len(sys.argv) == 3 and sys.argv[1] == "--dark"
    folder = Path(sys.argv[2]) if dark else Path(__file__).parent / "img"
    folder.mkdir(exist_ok=True)
    for name, picture in (("data_flow", data_flow()), ("layout_8_ranks", layout()), ("quality", quality()),
                          ("curves", curves()), ("steps", steps())):  # fmt: skip
        if picture is not None:
            (folder / f"{name}.svg").write_text(picture.svg(dark), encoding="utf-8")


if __name__ == "__main__":
    main()
