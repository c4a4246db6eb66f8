"""`megatron-bit demo`: the whole product on a laptop, by the commands that a user would type, each printed first."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bit.errors import UserError

A_PACKAGE = f"{sysconfig.get_path('stdlib')}/asyncio"  # 0.5 MB of text
PROMPTS = ("def ", "import ", "    return ", '"""Return ')


def main(text: Sequence[str], out: Path, steps: int) -> int:
    """Prepare, train half at TP=2 x PP=2, continue at DP=2, generate before and after, and compare by numbers."""
    begin = time.perf_counter()
    data, run = out / "data", out / "run"
    if (run / "FINISHED").exists():
        raise UserError(f"{run} holds a finished demo; give another folder, or remove {out}")
    _say("1. Text to shards: train a tokenizer, tokenize, write webdataset tars")
    _command("prepare", *text, "--out", str(data))
    _say("2. Train the first half on four ranks: tensor-parallel 2 x pipeline-parallel 2, ZeRO-1")
    # the demo's own settings: short intervals, so that there is something to see; and all of the validation split, for
    # its first files are of one kind (2.89 nats a token where all of them have 4.90)
    settings = [
        f"data.path={data}", f"run={run}", f"train.steps={steps}", f"optim.warmup_steps={max(1, steps // 15)}",
        f"log.every={max(1, steps // 12)}", f"evaluate.every={max(1, steps // 2)}", "evaluate.samples=256",
        f"checkpoint.every={max(1, steps // 2)}", "checkpoint.initial=true",
    ]  # fmt: skip
    half = [f"train.stop_at={max(1, steps // 2)}", "parallel.tp=2", "parallel.pp=2", "parallel.zero_stage=1"]
    _command("train", "--preset", "laptop", "--nproc", "4", *settings, *half)
    _say("3. Continue from that sharded checkpoint in another layout: data-parallel 2")
    _command("train", "--preset", "laptop", "--nproc", "2", *settings)
    _say("4. Generate: the untrained model, then the trained one, from the same prompts and seed")
    samples = {}
    for name, where in {"before": run / "checkpoints" / "step-00000000", "after": run}.items():
        arguments = ["generate", str(where), "--prompt", *PROMPTS, "--max-tokens", "48", "--json"]
        lines = _command(*arguments, capture=True).splitlines()
        samples[name] = [json.loads(line) for line in lines if line.startswith("{")]
    for name, results in samples.items():
        for result in results[:2]:
            print(f"--- {name} (step {result['step']})\n{result['prompt']}{result['text']}")
    _compare(data, run, samples, time.perf_counter() - begin)
    return 0


def _compare(data: Path, run: Path, samples: dict[str, list[dict[str, Any]]], seconds: float) -> None:
    known = _known_words(data)
    share = {}
    for name, results in samples.items():
        words = [word for result in results for word in result["text"].split()]
        share[name] = 100 * sum(word in known for word in words) / max(1, len(words))
    validation = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    width = max(1, len(log) // 20)
    loss = [sum(r["loss"] for r in part) / len(part) for part in (log[:width], log[-width:])]
    first, last = validation[0], validation[-1]
    _say("What changed")
    print(f"training loss, mean of the first and the last {width} steps    {loss[0]:.4f} -> {loss[1]:.4f}")
    print(
        f"validation, nats/token                                  "
        f"{first['nats_per_token_bound']:.3f} +- {first['standard_error']:.3f} -> "
        f"{last['nats_per_token_bound']:.3f} +- {last['standard_error']:.3f}"
    )
    print(f"words of the samples that occur in the text             {share['before']:.0f} % -> {share['after']:.0f} %")
    print(f"tokens trained on, and seconds for everything           {log[-1]['tokens']:,}, {seconds:.0f} s")
    _say("What to do next")
    print(f"tensorboard --logdir {shlex.quote(str(run / 'tensorboard'))}          # the curves")
    print(f"megatron-bit plot {shlex.quote(str(run))}                             # the same as a picture")
    print(f"megatron-bit generate {shlex.quote(str(run))} --prompt 'class '      # more text")
    print("megatron-bit train --preset 125m --dry-run --world-size 8     # what a cluster would run")
    print("megatron-bit doctor                                           # what this machine has")
    print("README.md, docs/                                              # the rest")


def _known_words(data: Path) -> set[str]:
    """Words of the training text, split at white space."""
    from megatron_bit.data.manifest import load_manifest
    from megatron_bit.data.stream import ShardReader
    from megatron_bit.data.tokenizer import Tokenizer

    manifest = load_manifest(data, check_files=False)
    tokenizer = Tokenizer(manifest.checked_tokenizer_path())
    reader = ShardReader(manifest, "train", capacity=1)
    known: set[str] = set()
    for shard in range(len(manifest.split("train").shards)):
        tokens = reader.tokens(shard)
        for document in np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id) + 1):
            known.update(tokenizer.decode(document[document != tokenizer.eos_id].tolist()).split())
    return known


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _command(*arguments: str, capture: bool = False) -> str:
    print(f"$ megatron-bit {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-P", "-m", "megatron_bit", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout or ""
