"""Any artefact, changed anyhow: a command does the right thing with it or says in one line why it does not.

Never a traceback, a hang, a file outside of the folder at hand, or more memory than a bound. `make fuzz` for an hour.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
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
        ["run/*.jsonl", "run/heartbeats/*", "run/slurm/0000/attempts.jsonl"],
        [
            ["status", "run"],
            ["status", "run", "--json"],
            ["status", "."],
            ["checkpoint", "ls", "run"],
            ["train", "run", "train.steps=3"],
        ],
    ),
    "cluster": (
        ["cluster.yaml", "tiny.yaml"],
        [
            ["submit", "tiny.yaml", "run=new", "--cluster", "cluster.yaml", "--dry-run"],
            ["chain", "2", "tiny.yaml", "run=new", "--cluster", "cluster.yaml", "--dry-run"],
        ],
    ),
    "tasks": (
        ["tasks/*/*"],
        [["evaluate", "hf", "--no-likelihood", "--tasks", task, "--tasks-data", "tasks"] for task in (
            "lambada", "hellaswag", "piqa")],
    ),
    "tokenizer": (
        ["data/tokenizer*", "hf/tokenizer*"],
        [
            ["generate", "hf", "--max-tokens", "8"],
            ["generate", "run", "--max-tokens", "8"],
            ["data", "verify", "data"],
            ["evaluate", "hf", "--samples", "2", "--data", "data"],
        ],
    ),
}  # fmt: skip
# Of these files every byte is under a hash: whatever is done with them without a new one is refused, or makes no
# difference. A checkpoint that is not what it was may be left for the one before.
HASHED = re.compile(r"(run/checkpoints/.*|data/(?!manifest\.json).*(\.tar|\.npy)|data/tokenizer\.model)")
READS = ("generate", "evaluate", "convert")  # what they print and write depends on nothing but what they read
LIMIT_BYTES = 3 << 30  # beyond what the warm process has
REAL = 0.04  # of the examples run the installed command
MAY_FAIL = {("checkpoint", "verify"), ("checkpoint", "diff"), ("data", "verify")}  # exit code 1 is their finding


def listing(folder: Path, without: Path) -> set[str]:
    """What is there, but for what is in `without`."""
    found = set()
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(path, name) != without]
        found |= {str(Path(path, name)) for name in (*folders, *files)}
    return found


def attempt(words: list[str], box: Path, installed: bool = False) -> forked.Ended:
    """Run a command in box/work."""
    home = box / "home"
    env = {"HOME": str(home), "XDG_STATE_HOME": str(home / "state"), "XDG_CACHE_HOME": str(home / "cache")}
    if installed:
        return forked.real(words, cwd=box / "work", env=env)
    return forked.command(words, home, cwd=[box / "work"], env=env, memory=LIMIT_BYTES)


def broken(words: list[str], ended: forked.Ended) -> str:
    """How the law was broken, "" if it was not."""
    allowed = {0, 2, 1} if tuple(words[:2]) in MAY_FAIL else {0, 2}
    if words[0] == "train" and "ran out of memory: " in ended.err:  # a configuration may ask for more than there is
        allowed = {88}
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
    if ended.code in (2, 88) and len(said) != 1 and not reports:
        return f"{len(said)} lines of error"
    return "" if ended.peak < 2 * LIMIT_BYTES else f"{ended.peak >> 20} MiB"


class Values:
    """What the commands give on artefacts that nobody has changed."""

    def __init__(self, whole: Path, box: Path) -> None:
        self._whole, self._box = whole, box
        self._known: dict[tuple[str, ...], tuple[str, dict[str, str]]] = {}

    def of(self, words: list[str]) -> tuple[str, dict[str, str]]:
        """Of a command: what it prints, and the hashes of what it writes."""
        key = tuple(words)
        if key not in self._known:
            _fresh(self._whole, self._box)
            ended = attempt(words, self._box)
            assert ended.code == 0, ended.err
            self._known[key] = outcome(ended, self._box / "work")
        return self._known[key]


def outcome(ended: forked.Ended, work: Path) -> tuple[str, dict[str, str]]:
    text = re.sub(r"[0-9.,]+ (s|GB/s|tokens/s|MB)\b|\(?[0-9.]+ s\)?", "TIME", ended.out)
    files = (path for path in (work / "out").rglob("*") if path.is_file())
    return text, {str(path.relative_to(work)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def other_value(name: str, words: list[str], anew: bool, ended: forked.Ended, work: Path, values: Values) -> str:
    """How a command that has done its work has given something else than it should, "" if it has not."""
    if ended.code != 0 or words[0] not in READS:
        return ""
    (text, files), (wanted, written) = outcome(ended, work), values.of(words)
    if not anew and HASHED.fullmatch(name) and (text, files) != (wanted, written):
        return f"other values: {text[:300]!r} {sorted(files.items() ^ written.items())[:2]}, not {wanted[:300]!r}"
    weights = {file for file in written if file.endswith(".safetensors") and "from" not in words[1]}
    if weights and not name.endswith((".safetensors", "index.json")):
        changed = [file for file in weights if files.get(file) != written[file]]
        return f"other weights: {changed}" if changed else ""
    return ""


def _fresh(whole: Path, box: Path) -> None:
    shutil.rmtree(box, ignore_errors=True)
    (box / "home").mkdir(parents=True)
    shutil.copytree(whole, box / "work")


@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", KINDS)
def test_changed_artefacts(kind: str, whole: Path, seconds: float, tmp_path: Path) -> None:
    patterns, commands = KINDS[kind]
    names = sorted({str(p.relative_to(whole)) for each in patterns for p in whole.glob(each) if p.is_file()})
    assert names, patterns
    until, number, found = time.monotonic() + seconds, 0, []
    seeds = random.Random(int(os.environ.get("MBIT_FUZZ_SEED", "0")))  # the same in every run, unless it is said
    keep_on = bool(os.environ.get("MBIT_FUZZ_COLLECT"))  # all that it finds, not the first alone

    # in CI the same few every time: what it refuses can be seen again, and a slow machine does not see others
    most = 10**9 if "MBIT_FUZZ_SECONDS" in os.environ else 4
    values = Values(whole, tmp_path / "box")

    while time.monotonic() < until and number < most:
        seed, number = seeds.randrange(2**32), number + 1
        choose = random.Random(seed)
        name, words, box = choose.choice(names), choose.choice(commands), tmp_path / "box"
        if words[0] in READS:
            values.of(words)
        _fresh(whole, box)
        anew = mutate.mutate(box / "work" / name, choose)
        before = listing(tmp_path, box)
        ended = attempt(words, box, installed=random.Random(seed).random() < REAL)
        wrong = broken(words, ended) or other_value(name, words, anew, ended, box / "work", values)
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
    every = {tuple(words) for _, commands in KINDS.values() for words in commands}
    refused = []
    for words in sorted(every):
        _fresh(whole, tmp_path)
        ended = attempt(list(words), tmp_path)
        if ended.code != (1 if words[:2] == ("checkpoint", "diff") else 0):
            refused.append(f"{' '.join(words)}: {ended.code}\n{ended.err[-600:]}")
    assert not refused, "\n".join(refused)
