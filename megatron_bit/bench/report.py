"""What the runs of `bench quality` gave, as Markdown: distances to the peer, curves over tokens, laws over sizes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_bit.bench import curves
from megatron_bit.bench.ladder import PEER, PEER_WITH_MEMORY, Rung, peer_of


@dataclass
class Result:
    """What one run of a rung gave; `nats` and `standard_error` per token on held-out text."""

    rung: Rung
    seed: int
    nats: float
    standard_error: float
    seconds: float
    flops: float  # of training, a token
    parameters: dict[str, int]
    text: str = ""
    settings: list[str] = field(default_factory=list)
    tokens: int = 0  # trained on
    size: int = 0  # parameters outside of tables that all rungs are fitted to

    def to_json(self) -> dict[str, Any]:
        keys = (
            "seed",
            "size",
            "tokens",
            "nats",
            "standard_error",
            "seconds",
            "flops",
            "parameters",
            "text",
            "settings",
        )
        return {"rung": self.rung.name, **{key: getattr(self, key) for key in keys}}


def render(report: Mapping[str, Any], results: Sequence[Result]) -> str:
    """The tables of every size; several seeds of a rung are a mean and the range."""
    lines = [
        f"`{report['command']}`: {report['tokens']:,} tokens a run, vocabulary {report['vocabulary']:,}; "
        f"{report['machine']}, {report['minutes']} minutes.",
    ]
    sizes = sorted({result.size for result in results})
    for size in sizes:
        of_size = [result for result in results if result.size == size]
        lines += ["", f"**{size:,} parameters outside of tables**"] * (len(sizes) > 1)
        last = [result for result in of_size if result.tokens == max(r.tokens for r in of_size)]
        lines += ["", *_distances(_by_rung(last))]
        if len(last) < len(of_size):
            lines += ["", *_curves(_by_rung(of_size))]
    lines += _laws(_by_rung(results)) if len(sizes) > 1 else []
    texts = [f"- {r.rung.name}: {' '.join(r.text.split())}" for r in last if r.text]
    return "\n".join([*lines, *(["", "Texts, after `The `:", "", *texts] if texts else [])]) + "\n"


def _by_rung(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.rung.name, []).append(result)
    return found


def _distances(by_rung: Mapping[str, Sequence[Result]]) -> list[str]:
    means = {name: statistics.mean(r.nats for r in runs) for name, runs in by_rung.items()}
    peers = [PEER, *(name for name in (PEER_WITH_MEMORY,) if name in means)]
    gaps = " | ".join(f"minus {name.replace(' softmax', '')}" for name in peers)
    lines = [
        f"| rung | nats/token | +- s.e. | seeds | {gaps} | parameters without tables | tables | MFLOP/token | s |",
        "|---" * (8 + len(peers)) + "|",
    ]
    for name, runs in by_rung.items():
        nats = [r.nats for r in runs]
        spread = f"{len(runs)} ({min(nats):.3f}-{max(nats):.3f})" if len(runs) > 1 else "1"
        gap = " | ".join(f"{means[name] - means[p]:+.3f}" if p in means and p != name else "" for p in peers)
        first = runs[0]
        lines.append(
            f"| {name} | {means[name]:.3f} | {first.standard_error:.3f} | {spread} | {gap} | "
            f"{first.parameters['rest']:,} | {first.parameters['tables']:,} | {first.flops / 1e6:.1f} | "
            f"{statistics.mean(r.seconds for r in runs):.0f} |"
        )
    return lines


def _curves(by_rung: Mapping[str, Sequence[Result]]) -> list[str]:
    """Nats of every rung at every budget, and how far it is there from the peer that has a memory if it has one."""
    means = {
        name: {t: statistics.mean(r.nats for r in runs if r.tokens == t) for t in sorted({r.tokens for r in runs})}
        for name, runs in by_rung.items()
    }
    budgets = sorted({tokens for of_rung in means.values() for tokens in of_rung})
    heads = [f"{tokens / 1e6:g} M | minus AR" for tokens in budgets]
    lines = [f"| rung | {' | '.join(heads)} | PFLOP of the last | law |", "|---" * (2 * len(budgets) + 3) + "|"]
    for name, of_rung in means.items():
        cells, peer = [], peer_of(name)
        for tokens in budgets:
            value, base = of_rung.get(tokens), means.get(peer, {}).get(tokens)
            gap = "" if value is None or base is None or name == peer else f"{value - base:+.3f}"
            cells.append(f"{'' if value is None else f'{value:.3f}'} | {gap}")
        law = curves.fit([*of_rung], [*of_rung.values()])
        flops = max(of_rung) * by_rung[name][0].flops
        lines.append(f"| {name} | {' | '.join(cells)} | {flops / 1e15:.3g} | {'' if law is None else law} |")
    return [
        *lines, "", "Minus AR: of a rung with a memory, from AR with a memory. Law: nats of T million tokens, with the "
        "root of the mean square that it leaves.",
    ]  # fmt: skip


def _laws(by_rung: Mapping[str, Sequence[Result]]) -> list[str]:
    found = []
    for name, runs in by_rung.items():
        law = curves.fit_sizes([r.size for r in runs], [r.tokens for r in runs], [r.nats for r in runs])
        if law is not None:
            found.append(f"| {name} | {law} |")
    head = ["", "| rung | law of T million tokens and N million parameters outside of tables |", "|---|---|"]
    return [*head, *found] if found else []
