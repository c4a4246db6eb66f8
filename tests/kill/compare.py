"""Whether a run that was disturbed has ended as one that was not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import tiny_runs
import torch

from megatron_bit.run.checkpoints import complete, problems, read_meta

TIMED = {"seconds", "tokens_per_second"}  # of the machine


def differences(run: Path, whole: Path, mirror: Path | None) -> list[str]:
    """A line for each thing that is not as in `whole`, the same run left alone."""
    found = []
    if not (run / "FINISHED").exists():
        found.append("no FINISHED")
    a, b = (complete(folder / "checkpoints")[-1] for folder in (run, whole))
    if a.name != b.name:
        return [*found, f"the newest checkpoint is {a.name}, and {b.name} there"]
    found += problems(a)
    if (one := read_meta(a)["state"]) != (other := read_meta(b)["state"]):
        found.append(f"state {one}, and {other} there")
    index = json.loads((b / "index.json").read_text())
    for state in sorted({state for entry in index.values() for state in entry["states"]}):
        ours, theirs = (tiny_runs.read_state(folder, state) for folder in (a, b))
        found += [f"{state} of {name} differs" for name in theirs if not torch.equal(ours[name], theirs[name])]
    for name in ("log.jsonl", "validation.jsonl"):
        one, other = _records(run / name), _records(whole / name)
        if one != other:
            at = next(
                (i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other))
            )
            found.append(f"{name} record {at}: {one[at : at + 1]}, and {other[at : at + 1]} there")
    if (whole / "tensorboard").exists() and _scalars(run) != _scalars(whole):
        found.append("tensorboard's scalars differ")
    found += [f"{path} is left" for path in (run / "checkpoints").iterdir() if path.suffix]
    if mirror is not None:
        copy = mirror / a.name
        found += problems(copy) if copy.is_dir() else [f"{copy} is not there"]
    return found


def complaints(said: str, codes: list[int]) -> list[str]:
    """What no fault excuses in a job's output and exit codes."""
    found = [f"a traceback: {line}" for line in said.splitlines() if "Traceback" in line][:1]
    found += [f"exit code {code}" for code in codes if code not in (0, 1, 2, 85, 87, -9, -15)]
    spoken = re.findall(r"megatron-bit: error|stopped: another rank|did not answer", said)
    if 2 in codes and not spoken:
        found.append("exit code 2 without a word")
    return found


def _records(path: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMED}
        for line in path.read_text().splitlines()
    ]


def _scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name in ("train/loss", "validation/nats_per_token_bound")]
    return {name: [(point.step, point.value) for point in events.Scalars(name)] for name in names}
