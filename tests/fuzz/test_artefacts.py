"""Any artefact, changed anyhow: a command does the right thing with it or says in one line why it does not.

Never a traceback, a hang, a file outside of the folder at hand, or more memory than a bound. `make fuzz` for an hour.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import forked
import mutate
import pytest

TRAIN = ["train", "tiny.yaml", "run=new", "train.steps=1"]
KINDS: dict[str, tuple[list[str], list[list[str]]]] = {  # which files are changed, and what is tried on them then
    "checkpoint": (
        ["run/checkpoints/step-00000002/*"],
        [
            ["generate", "run", "--max-tokens", "8"],
            ["checkpoint", "ls", "run"],
            ["checkpoint", "verify", "run"],
            ["checkpoint", "diff", "run", "run/checkpoints/step-00000001"],
            ["convert", "run", "out"],
            ["train", "run", "train.steps=3"],
            ["evaluate", "run", "--samples", "2"],
        ],
    ),
    "run": (
        ["run/config.yaml", "run/identity.json"],
        [["train", "run", "train.steps=3"], ["generate", "run", "--max-tokens", "8"], ["status", "run"]],
    ),
    "data": (["data/*"], [TRAIN, ["data", "verify", "data"], ["data", "inspect", "data"], [*TRAIN, "--dry-run"]]),
    "used_data": (
        ["data/*"],
        [
            ["generate", "run", "--max-tokens", "8"],
            ["evaluate", "run", "--samples", "2"],
            ["convert", "run", "out"],
        ],
    ),
    "converted": (
        ["hf/*.json", "hf/*.safetensors"],
        [
            ["generate", "hf", "--max-tokens", "8"],
            ["evaluate", "hf", "--samples", "2", "--data", "data"],
            ["convert", "--from", "hf", "--to", "run", "hf", "out", "tiny.yaml"],
        ],
    ),
    "configuration": (["tiny.yaml"], [[*TRAIN, "--dry-run"], TRAIN, ["plan", "tiny.yaml"]]),
    "prompts": (["prompts.jsonl"], [["generate", "hf", "--prompt-file", "prompts.jsonl", "--max-tokens", "8"]]),
    "status": (
        ["run/*.jsonl", "run/heartbeats/*", "run/attempts*"],
        [["status", "run"], ["status", "run", "--json"], ["train", "run", "train.steps=3"]],
    ),
}
MAY_FAIL = {("checkpoint", "verify"), ("checkpoint", "diff"), ("data", "verify")}  # exit code 1 is their finding


def listing(folder: Path, without: Path) -> set[str]:
    """What is there, but for what is in `without`."""
    found = set()
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(path, name) != without]
        found |= {str(Path(path, name)) for name in (*folders, *files)}
    return found


def broken(words: list[str], ended: forked.Ended) -> str:
    """How the law was broken, "" if it was not."""
    allowed = {0, 2, 1} if tuple(words[:2]) in MAY_FAIL else {0, 2}
    if ended.code not in allowed:
        return f"exit {ended.code}"
    if "Traceback (most recent call last)" in ended.err or "\nfailed:" in f"\n{ended.err}":
        return "a traceback"
    said = [line for line in ended.err.splitlines() if line.startswith("megatron-bit: error:")]
    reports = words[:2] in (
        ["checkpoint", "verify"],
        ["checkpoint", "ls"],
        ["data", "verify"],
    )  # a line for each problem
    if ended.code == 2 and len(said) != 1 and not reports:
        return f"{len(said)} lines of error"
    return "" if ended.peak < 2 * forked.LIMIT_BYTES else f"{ended.peak >> 20} MiB"


@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", KINDS)
def test_changed_artefacts(kind: str, whole: Path, seconds: float, tmp_path: Path) -> None:
    forked.warm()
    patterns, commands = KINDS[kind]
    names = sorted({str(p.relative_to(whole)) for each in patterns for p in whole.glob(each) if p.is_file()})
    assert names, patterns
    until, number, found = time.monotonic() + seconds, 0, []
    seeds = random.Random(int(os.environ.get("MBIT_FUZZ_SEED", "0")))  # the same in every run, unless it is said
    keep_on = bool(os.environ.get("MBIT_FUZZ_COLLECT"))  # all that it finds, not the first alone

    # in CI the same few every time: what it refuses can be seen again, and a slow machine does not see others
    most = 10**9 if "MBIT_FUZZ_SECONDS" in os.environ else 5

    while time.monotonic() < until and number < most:
        seed, number = seeds.randrange(2**32), number + 1
        choose = random.Random(seed)
        name, words, box = choose.choice(names), choose.choice(commands), tmp_path / "box"
        shutil.rmtree(box, ignore_errors=True)
        (box / "home").mkdir(parents=True)
        shutil.copytree(whole, box / "work")
        mutate.mutate(box / "work" / name, choose)
        before = listing(tmp_path, box)
        ended = forked.command(words, box / "work", box / "home")
        wrong = broken(words, ended)
        if listing(tmp_path, box) != before or (box / "work" / "pwned").exists():
            wrong = "a file outside"
        if wrong:
            found.append(f"{kind} seed={seed} {name}: megatron-bit {' '.join(words)}: {wrong}\n{ended.err[-1500:]}")
            print(found[-1], flush=True)
            if not keep_on:
                break
    print(f"{kind}: {number} examples")
    assert not found, "\n\n".join(found)


@pytest.mark.timeout(0)
def test_the_commands_work_on_what_nobody_has_changed(whole: Path, tmp_path: Path) -> None:
    """Else the fuzzer would be content with commands that refuse everything."""
    forked.warm()
    every = {tuple(words) for _, commands in KINDS.values() for words in commands}
    refused = []
    for words in sorted(every):
        shutil.rmtree(tmp_path, ignore_errors=True)
        (tmp_path / "home").mkdir(parents=True)
        shutil.copytree(whole, tmp_path / "work")
        ended = forked.command(list(words), tmp_path / "work", tmp_path / "home")
        if ended.code != (1 if words[:2] == ("checkpoint", "diff") else 0):
            refused.append(f"{' '.join(words)}: {ended.code}\n{ended.err[-600:]}")
    assert not refused, "\n".join(refused)
