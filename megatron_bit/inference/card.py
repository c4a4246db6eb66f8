"""The model card of a converted folder: README.md and a picture of the run's curves, from what the run has recorded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import yaml

from megatron_bit.inference.hf_names import Source
from megatron_bit.planning.parameters import parameter_counts
from megatron_bit.run.curves import read_curves

PICTURE = "curves.svg"
_LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder}
model = AutoModelForCausalLM.from_pretrained(folder{trust})
"""
_TEXT = """tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32{how})[0], skip_special_tokens=True))
"""
_RECORDS = """import torch

given = torch.zeros(1, 0, (model.config.bits + 7) // 8, dtype=torch.uint8)  # records before those that are drawn
print(model.generate(given, max_new_tokens=32).shape)
"""


def write_card(source: Source, folder: Path, name: str) -> None:
    """Write README.md, and the curves where the run has any, of steps up to the checkpoint's.

    Args:
        name: of the folder, as users will load it.
    """
    curves = read_curves(source.folder.parent.parent)
    train = [(tokens, nats) for tokens, step, nats in curves.train if step <= source.step]
    tested = [point for point in curves.validation if point[1] <= source.step]
    if len(train) > 1 or len(tested) > 1:
        (folder / PICTURE).write_text(_picture(train, [(p[0], p[2]) for p in tested]), encoding="utf-8")
    own = source.weights == "trained"  # an average of them was not validated
    text = _text(source, name, tested[-1] if tested and own else None, (folder / PICTURE).exists())
    (folder / "README.md").write_text(text, encoding="utf-8")


def _text(source: Source, name: str, tested: tuple[float, float, float, float] | None, picture: bool) -> str:
    config, m = source.config, source.config.model
    what = "nats per token" if config.exact else "bound on the nats per token"
    front: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["megatron_bit", *(() if source.softmax else ("bitlm", "custom_code"))],
    }
    if config.exact and not source.records:
        front["pipeline_tag"] = "text-generation"
    if tested is not None:
        metric = {"type": "nats_per_token", "name": what, "value": round(tested[2], 4)}
        result = {
            "task": {"type": "text-generation", "name": "likelihood"},
            "dataset": {"type": "validation", "name": "validation split of the training data"},
            "metrics": [metric],
        }
        front["model-index"] = [{"name": name, "results": [result]}]
    seen = source.step * config.train.global_batch_size * config.data.seq_length
    rows = {
        "head": m.head.kind,
        "parameters": f"{sum(parameter_counts(config).values()):,}",
        "backbone": f"{m.num_layers} layers of {m.hidden_size}",
        "context": f"{config.data.seq_length:,} {'records' if source.records else 'tokens'}",
        "vocabulary": f"{source.vocab_size:,}",
        "trained": f"{source.step:,} steps, {seen:,} {'records' if source.records else 'tokens'}",
    }
    if source.records:
        del rows["vocabulary"]
    if not source.softmax:
        rows["a token"] = f"{m.bits} bits in {len(m.group_sizes)} groups, code {m.code}"
        rows["a block"] = f"{m.block_size} tokens for one pass of the backbone"
    if source.weights != "trained":
        rows["weights"] = "their running average"
    lines = [
        "---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "", f"# {name}", "", _about(source), "",
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), "",
    ]  # fmt: skip
    if tested is not None:
        lines += [
            f"Validation split of its training data: **{tested[2]:.3f} +- {tested[3]:.3f}** {what} (step "
            f"{round(tested[1]):,}; the standard error is over samples).", "",
        ]  # fmt: skip
    if picture:
        lines += [f"![nats per token over tokens]({PICTURE})", ""]
    trust = "" if source.softmax else ", trust_remote_code=True"
    code = _LOAD.format(folder=json.dumps(name), trust=trust)
    code += _RECORDS if source.records else _TEXT.format(how=", do_sample=True" if source.softmax else "")
    return "\n".join([*lines, "## Use", "", "```python", code.rstrip(), "```", ""])


def _about(source: Source) -> str:
    if source.softmax:
        return "An autoregressive model over a softmax, trained with megatron_bit as a BitLM's peer."
    how = {
        "chain": "decides the bits of the next block group after group, with an exact likelihood",
        "diffusion": "denoises the bits of the next block all together; its likelihood is a bound",
    }[source.config.model.head.kind]
    return (
        "A BitLM (arXiv 2605.11577), trained with megatron_bit: tokens are fixed-length binary codes, a causal "
        f"transformer reads blocks of them, and a light head {how}. It needs torch and transformers alone; the code it "
        "runs is in this folder."
    )


def _picture(train: list[tuple[float, float]], tested: list[tuple[float, float]]) -> str:
    """Curves over tokens; an axis of nats that leaves out what only the first steps have."""
    points = [*train, *tested]
    most = max(tokens for tokens, _ in points) or 1.0
    shown = [nats for tokens, nats in points if tokens >= most / 20] or [nats for _, nats in points]
    low, high = min(shown), max(shown)
    high = high if high > low else low + 1.0
    left, right, top, bottom = 60, 580, 20, 260

    def place(tokens: float, nats: float) -> str:
        y = bottom - (bottom - top) * (min(nats, high) - low) / (high - low)
        return f"{left + (right - left) * tokens / most:.1f},{y:.1f}"

    def line(points: list[tuple[float, float]], colour: str, width: float) -> str:
        path = " ".join(place(*point) for point in points)
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'

    def label(x: float, y: float, text: str, anchor: str) -> str:
        font = 'font-size="12" font-family="sans-serif"'
        return f'<text x="{x}" y="{y}" {font} text-anchor="{anchor}">{escape(text)}</text>'

    frame = f'<polyline points="{left},{top} {left},{bottom} {right},{bottom}" fill="none" stroke="#57606a"/>'
    parts = [frame, line(train, "#0969da", 1.5), line(tested, "#cf222e", 2.5)]
    parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="#cf222e"/>' for x, y in (place(*p).split(",") for p in tested)]
    digits = max(0, 2 - math.floor(math.log10(high - low)))
    parts += [label(left - 8, y, f"{v:.{min(digits, 4)}f}", "end") for v, y in ((high, top + 4), (low, bottom + 4))]
    parts += [label(right, bottom + 18, f"{most:,.0f} tokens", "end"), label(left, bottom + 18, "0", "middle")]
    parts += [label(right, top, "nats per token: training (blue), validation (red)", "end")]
    body = "".join(parts)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 290" width="600" height="290">'
        f'<rect width="600" height="290" fill="#ffffff"/>{body}</svg>\n'
    )
