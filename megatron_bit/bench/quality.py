"""`megatron-bit bench quality`: one switch at a time, what each is worth in nats per token against the softmax peer.

All rungs see the same data in the same order from the same seeds, have the same number of parameters outside of
tables (the width of the backbone's SwiGLU is fitted), and train on the same number of tokens by `megatron-bit train`.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_bit.bench import curves
from megatron_bit.bench.commands import Commands, Paused
from megatron_bit.bench.ladder import REFERENCE, Rung, fit_width, ladder, other_parameters, select
from megatron_bit.config import Config, load_config
from megatron_bit.data.manifest import load_manifest
from megatron_bit.errors import EXIT_PREEMPTED
from megatron_bit.io.files import write_atomic
from megatron_bit.io.measured import json_of, number
from megatron_bit.parallel.split import train_flops
from megatron_bit.planning.parameters import table_parameters

PLAIN = ("model.names=sum", "model.head.prior_rank=0")  # what a rung does not say it has not, whatever the preset has
SIZES: dict[str, tuple[str, ...]] = {
    "small": (
        "model.hidden_size=96", "model.num_heads=4", "model.num_kv_heads=4", "model.num_layers=3",
        "model.ffn_hidden_size=256", "model.init_std=0.04", "model.head.num_layers=3", "model.head.hidden_size=96",
        "model.head.num_heads=4", "model.head.ffn_hidden_size=256", "data.seq_length=256",
        "train.global_batch_size=4", "train.micro_batch_size=4", "train.precision=fp32", "optim.lr=6.0e-3",
        "optim.warmup_steps=50", "evaluate.samples=128", "evaluate.noise_samples=16", *PLAIN,
    ),
    "gpu": (
        "model.hidden_size=512", "model.num_heads=8", "model.num_kv_heads=8", "model.num_layers=8",
        "model.ffn_hidden_size=1408", "model.init_std=0.02", "model.head.num_layers=3", "model.head.hidden_size=512",
        "model.head.num_heads=8", "model.head.ffn_hidden_size=1408", "data.seq_length=1024",
        "train.global_batch_size=64", "train.micro_batch_size=32", "train.precision=bf16", "optim.lr=6.0e-4",
        "optim.warmup_steps=200", "evaluate.samples=512", "evaluate.noise_samples=32", *PLAIN,
    ),
}  # fmt: skip
STEPS = {"small": 400, "gpu": 3000}
VOCABULARY = {"small": 1024, "gpu": 32768}  # of the data that is prepared if none is given
PROMPTS = ("The ",)


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

    def to_json(self) -> dict[str, Any]:
        keys = ("seed", "tokens", "nats", "standard_error", "seconds", "flops", "parameters", "text", "settings")
        return {"rung": self.rung.name, **{key: getattr(self, key) for key in keys}}


def main(
    budget: str,
    out: Path,
    data: Path | None,
    steps: int | None,
    seeds: int,
    jobs: int,
    only: Sequence[str],
    all_rungs: bool,
    settings: Sequence[str],
    as_json: bool,
    tokens: Sequence[str] = (),
    minutes: float | None = None,
) -> int:
    """Train what is not there yet, and write OUT/quality.md and OUT/quality.json of what has finished.

    Args:
        minutes: after these, runs save and end, for the same command to go on with; the exit code is EXIT_PREEMPTED.
    """
    command = Commands(jobs, minutes)
    out.mkdir(parents=True, exist_ok=True)
    folder = data if data is not None else _own_data(out, VOCABULARY[budget])
    manifest = load_manifest(folder, check_files=False)
    manifest.need_vocabulary("`bench quality`")
    bits = max(1, (manifest.vocab_size - 1).bit_length())
    common = (*SIZES[budget], f"data.path={folder}", f"model.bits={bits}", f"train.steps={steps or STEPS[budget]}")
    common = (*common, *(curves.SETTINGS if tokens else ()), *settings)
    target = load_config(preset="laptop", overrides=[*common, *REFERENCE]).with_vocab_size(manifest.vocab_size)
    every = ladder(bits, target.model.num_layers + target.model.head.num_layers)
    rungs = select(every, only, all_rungs)
    per_step = target.train.global_batch_size * target.data.seq_length
    budgets = curves.budgets(tokens, per_step, target.optim.warmup_steps) if tokens else []
    if any("model.code=semantic" in rung.overrides for rung in rungs):
        _learn_code(folder, bits)
    work = [(rung, seed) for rung in rungs for seed in range(seeds if rung.headline else 1)]
    begin = time.monotonic()
    results: list[Result] = []
    unfinished = 0
    with command.until_told(), ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_run, rung, seed, common, target, out, command, budgets) for rung, seed in work]
        try:
            for done, future in enumerate(futures, 1):
                try:
                    results += future.result()
                except Paused:
                    unfinished += 1
                    continue
                result, left = results[-1], (time.monotonic() - begin) / done * (len(work) - done)
                print(
                    f"{done}/{len(work)}  {result.rung.name}, seed {result.seed}: {result.nats:.3f} +- "
                    f"{result.standard_error:.3f} nats/token, {result.seconds:.0f} s; ETA {left / 60:.0f} min",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if unfinished:
        print(f"{unfinished} of {len(work)} runs are unfinished; the same command goes on with them", file=sys.stderr)
    if not results:
        return EXIT_PREEMPTED
    report = {
        "command": shlex.join(["megatron-bit", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jobs} runs at a time",
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "tokens": (max(budgets) if budgets else target.train.steps) * per_step,
        "vocabulary": manifest.vocab_size,
        "results": [result.to_json() for result in results],
    }
    write_atomic(out / "quality.json", json_of(report, indent=1).encode())
    table = render(report, results)
    write_atomic(out / "quality.md", table.encode())
    print(json_of(report, indent=1) if as_json else table)
    return EXIT_PREEMPTED if unfinished else 0


def render(report: Mapping[str, Any], results: Sequence[Result]) -> str:
    """The table as Markdown; several seeds of a rung are a mean and the range."""
    most = max(result.tokens for result in results)
    last = [result for result in results if result.tokens == most]
    by_rung: dict[str, list[Result]] = {}
    for result in last:
        by_rung.setdefault(result.rung.name, []).append(result)
    peer = by_rung.get("AR softmax")
    base = statistics.mean(r.nats for r in peer) if peer else None
    lines = [
        f"`{report['command']}`: {report['tokens']:,} tokens a run, vocabulary {report['vocabulary']:,}; "
        f"{report['machine']}, {report['minutes']} minutes.",
        "",
        "| rung | nats/token | +- s.e. | seeds | minus AR | parameters without tables | tables | MFLOP/token | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in by_rung.items():
        nats = [r.nats for r in runs]
        mean = statistics.mean(nats)
        spread = f"{len(runs)} ({min(nats):.3f}-{max(nats):.3f})" if len(runs) > 1 else "1"
        gap = f"{mean - base:+.3f}" if base is not None and name != "AR softmax" else ""
        first = runs[0]
        lines.append(
            f"| {name} | {mean:.3f} | {first.standard_error:.3f} | {spread} | {gap} | {first.parameters['rest']:,} | "
            f"{first.parameters['tables']:,} | {first.flops / 1e6:.1f} | "
            f"{statistics.mean(r.seconds for r in runs):.0f} |"
        )
    if len(last) < len(results):
        points: dict[str, dict[int, list[float]]] = {}
        for result in results:
            points.setdefault(result.rung.name, {}).setdefault(result.tokens, []).append(result.nats)
        lines += ["", *curves.table(points, {name: runs[0].flops for name, runs in by_rung.items()}, "AR softmax")]
    lines += ["", "Texts, after `The `:", ""]
    lines += [f"- {runs[0].rung.name}: {' '.join(runs[0].text.split())}" for runs in by_rung.values() if runs[0].text]
    return "\n".join(lines) + "\n"


def _run(
    rung: Rung,
    seed: int,
    common: Sequence[str],
    target: Config,
    out: Path,
    command: Commands,
    budgets: Sequence[int],
) -> list[Result]:
    """Train a rung, at the size of `target`, unless it has finished already, and read what it left: a result for each
    of `budgets` (steps, ascending), or if there are none one for the configuration's own steps."""
    settings = [*common, *rung.overrides, f"train.seed={1234 + seed}"]
    vocab_size = target.model.vocab_size
    assert vocab_size is not None
    config = fit_width(load_config(preset="laptop", overrides=settings).with_vocab_size(vocab_size), target)
    settings += [f"model.ffn_hidden_size={config.model.ffn_hidden_size}"]
    run = out / "runs" / f"{rung.slug}-{seed}"
    arguments = [
        "--preset", "laptop", *settings, "parallel.tp=1", "parallel.pp=1", "log.tensorboard=false",
        "evaluate.initial=false",
    ]  # fmt: skip
    if budgets:
        runs = curves.train(arguments, budgets, run, command)
    else:
        steps, runs = config.train.steps, {config.train.steps: run}
        how = [f"run={run}", f"evaluate.every={steps}", f"checkpoint.every={steps}", "checkpoint.keep=1"]
        if not (run / "FINISHED").exists():
            command(["train", *arguments, *how], run)
    return [_read(rung, seed, config, steps, settings, run, command) for steps, run in runs.items()]


def _read(
    rung: Rung, seed: int, config: Config, steps: int, settings: list[str], run: Path, command: Commands
) -> Result:
    last = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    parameters = {"rest": other_parameters(config), "tables": table_parameters(config)}
    text = _text(run, command) if rung.text and seed == 0 else ""
    return Result(
        rung, seed, number(last["nats_per_token_bound"]), number(last["standard_error"]),
        sum(r["seconds"] for r in log), train_flops(config), parameters, text, settings,
        steps * config.train.global_batch_size * config.data.seq_length,
    )  # fmt: skip


def _text(run: Path, command: Commands) -> str:
    arguments = ["generate", str(run), "--prompt", *PROMPTS, "--max-tokens", "40", "--json"]
    return str(json.loads(command(arguments, run).splitlines()[-1])["text"])


def _own_data(out: Path, vocab_size: int) -> Path:
    """Python's standard library as data, if none is given."""
    from mbit_data.prepare import PrepareOptions, prepare

    folder = out / "data"
    prepare(PrepareOptions(inputs=("stdlib",), out=folder, vocab_size=vocab_size), progress=False)
    return folder


def _learn_code(folder: Path, bits: int) -> None:
    from mbit_data.codes import CodeOptions, learn

    if not (folder / "codes" / f"semantic-{bits}.safetensors").exists():
        learn(folder, CodeOptions(bits=bits), None, False, progress=True)
