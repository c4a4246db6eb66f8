"""`megatron-bit bench quality`: one switch at a time, what each is worth in nats per token against the softmax peer.

All rungs see the same data in the same order from the same seeds, have the same number of parameters outside of
tables (the width of the backbone's SwiGLU is fitted), and train on the same number of tokens by `megatron-bit train`.
"""

from __future__ import annotations

import functools
import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_bit.bench import curves
from megatron_bit.bench.commands import Commands, Paused
from megatron_bit.bench.ladder import Rung, fit_width, ladder, other_parameters, select
from megatron_bit.bench.machine import cores
from megatron_bit.bench.report import Result, render
from megatron_bit.bench.sizes import Size, sizes
from megatron_bit.config import Config, leaves, load_config
from megatron_bit.data.manifest import load_manifest
from megatron_bit.errors import EXIT_PREEMPTED, UserError
from megatron_bit.io.files import write_atomic
from megatron_bit.io.measured import json_of, number
from megatron_bit.parallel.split import train_flops
from megatron_bit.planning.parameters import table_parameters

STEPS = {"small": 400, "gpu": 3000}
VOCABULARY = {"small": 1024, "gpu": 32768}  # of the data that is prepared if none is given
PROMPTS = ("The ",)
COMPARED = (
    "train.seed", "train.global_batch_size", "train.precision", "data.seq_length", "evaluate.samples",
    "evaluate.noise_samples",
)  # fmt: skip


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
    wanted_sizes: Sequence[str] = (),
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
    common = (f"data.path={folder}", f"model.bits={bits}", f"train.steps={steps or STEPS[budget]}")
    common = (*common, *(curves.SETTINGS if tokens else ()))
    all_sizes = sizes(budget, wanted_sizes, common, settings, manifest.vocab_size)
    target = all_sizes[0].target
    every = ladder(bits, target.model.num_layers + target.model.head.num_layers)
    rungs = select(every, only, all_rungs)
    per_step = target.train.global_batch_size * target.data.seq_length
    budgets = curves.budgets(tokens, per_step, target.optim.warmup_steps) if tokens else []
    if any("model.code=semantic" in rung.overrides for rung in rungs):
        _learn_code(folder, bits)
    work = [(size, rung, seed) for size in all_sizes for rung in rungs for seed in range(seeds if rung.headline else 1)]
    begin = time.monotonic()
    results: list[Result] = []
    unfinished = 0
    with command.until_told(), ThreadPoolExecutor(jobs) as pool:
        marked = len(all_sizes) > 1
        futures = [pool.submit(_run, *which, out, command, budgets, marked) for which in work]
        try:
            for done, future in enumerate(futures, 1):
                try:
                    results += future.result()
                except Paused:
                    unfinished += 1
                    continue
                result, left = results[-1], (time.monotonic() - begin) / done * (len(work) - done)
                print(
                    f"{done}/{len(work)}  {result.rung.name}, {f'{result.size:,} parameters, ' * marked}seed "
                    f"{result.seed}: {result.nats:.3f} +- "
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
        "machine": f"{platform.machine()}, {cores()} cores, {jobs} runs at a time",
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


def _run(
    size: Size,
    rung: Rung,
    seed: int,
    out: Path,
    command: Commands,
    budgets: Sequence[int],
    marked: bool,
) -> list[Result]:
    """Train a rung of a size, unless it has finished already, and read what it left: a result for each of `budgets`
    (steps, ascending), or if there are none one for the configuration's own steps.

    marked: its folder has the width in its name.
    """
    settings = [*size.settings, *rung.overrides, f"train.seed={1234 + seed}"]
    vocab_size = size.target.model.vocab_size
    assert vocab_size is not None
    config = fit_width(load_config(preset="laptop", overrides=settings).with_vocab_size(vocab_size), size.target)
    settings += [f"model.ffn_hidden_size={config.model.ffn_hidden_size}"]
    width = f"-w{config.model.hidden_size}" if marked else ""
    run = out / "runs" / f"{rung.slug}{width}-{seed}"
    _refuse_others(run, config, ("train.steps",) if not budgets else ())
    arguments = [
        "--preset", "laptop", *settings, "parallel.tp=1", "parallel.pp=1", "log.to=[]",
        "evaluate.initial=false",
    ]  # fmt: skip
    if budgets:
        runs = curves.train(arguments, budgets, run, command)
    else:
        steps, runs = config.train.steps, {config.train.steps: run}
        how = [f"run={run}", f"evaluate.every={steps}", f"checkpoint.every={steps}", "checkpoint.keep=1"]
        if not (run / "FINISHED").exists():
            command(["train", *arguments, *how], run)
    return [_read(size, rung, seed, config, steps, settings, run, command) for steps, run in runs.items()]


def _refuse_others(run: Path, config: Config, also: Sequence[str]) -> None:
    """UserError if `run` was begun with other settings than `config`: its figures would be shown as those of these.

    also: keys to compare beside those of every rung.
    """
    if not (run / "config.yaml").exists():
        return
    there = load_config(run / "config.yaml")
    every = [key for key, _ in leaves() if key.startswith(("model.", "diffusion.", "optim."))]
    for key in (*every, *COMPARED, *also):
        then, now = (functools.reduce(getattr, key.split("."), of) for of in (there, config))
        if then != now and key != "model.vocab_size":  # which the data says
            raise UserError(
                f"{run} was trained with {key}={then}, and the command says {now}; give another --out, or set it back"
            )


def _read(
    size: Size, rung: Rung, seed: int, config: Config, steps: int, settings: list[str], run: Path, command: Commands
) -> Result:
    last = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    parameters = {"rest": other_parameters(config), "tables": table_parameters(config)}
    text = _text(run, command) if rung.text and seed == 0 else ""
    return Result(
        rung, seed, number(last["nats_per_token_bound"]), number(last["standard_error"]),
        sum(r["seconds"] for r in log), train_flops(config), parameters, text, settings,
        steps * config.train.global_batch_size * config.data.seq_length, size.parameters,
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
