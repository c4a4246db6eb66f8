"""`megatron-bit checkpoint ls|verify|diff|rm`: looking after the checkpoints of a run, without starting it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_bit.config import flat
from megatron_bit.errors import UserError
from megatron_bit.io.text import shown
from megatron_bit.run import checkpoints as folders
from megatron_bit.run.lock import RunLock


def resolve(target: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first, or the one that `target` is; UserError if there are none."""
    if not target.is_dir():
        raise UserError(f"{target} is no folder; give a run folder or one of its checkpoints")
    return folders.checkpoints_of(target)


def describe(folder: Path) -> dict[str, Any]:
    """One line of `ls`."""
    meta = folders.read_meta(folder)
    return {
        "step": meta["step"],
        "tokens": meta["state"]["tokens"],
        "layout": meta["layout"],
        "bytes": folders.size(folder),
        "written": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((folder / "COMMITTED").stat().st_mtime)),
        "path": str(folder),
    }


def ls(target: Path, as_json: bool) -> int:
    """Print every complete checkpoint of a run, oldest first."""
    lines, unreadable = [], []
    for folder in resolve(target):
        try:
            lines.append(describe(folder))
        except UserError as error:
            unreadable.append(str(error))
    if as_json:
        print(json.dumps(lines, indent=1))
    else:
        print(f"{'step':>10} {'tokens':>16} {'MiB':>10}  {'written':19}  layout")
        for line in lines:
            size = f"{line['bytes'] / 2**20:,.1f}"
            print(f"{line['step']:>10} {line['tokens']:>16,} {size:>10}  {line['written']}  {shown(line['layout'])}")
    for text in unreadable:
        print(f"unreadable: {text}", file=sys.stderr)
    return 2 if unreadable else 0


def verify(target: Path) -> int:
    """Hash every file of every checkpoint again; 2 if anything is wrong."""
    found = resolve(target)
    total = sum(folders.size(folder) for folder in found)
    done, begin, damaged = 0, time.monotonic(), 0
    for folder in found:
        lines = folders.problems(folder)
        done += folders.size(folder)
        damaged += bool(lines)
        for line in lines:
            print(line)
        pace = done / max(1e-9, time.monotonic() - begin)
        state = f"{len(lines)} problems" if lines else "undamaged"
        print(f"{folder}: {state}  ({done / total:.0%}, {pace / 2**20:.0f} MiB/s, ETA {(total - done) / pace:.0f} s)")
    print(f"{target}: {len(found) - damaged} of {len(found)} checkpoints are undamaged")
    return 2 if damaged else 0


def diff(a: Path, b: Path, as_json: bool) -> int:
    """Compare two checkpoints (of any layouts): configuration keys, and every tensor of every state.

    Returns:
        0 if all tensors are equal to the bit, 1 if not.
    """
    pair = [resolve(target)[-1] for target in (a, b)]
    metas = [folders.read_meta(folder) for folder in pair]
    config = [dict(flat(meta["config"])) for meta in metas]
    changed = {
        key: [config[0].get(key), config[1].get(key)]
        for key in sorted(config[0].keys() | config[1].keys())
        if config[0].get(key) != config[1].get(key)
    }
    tensors, missing = _compare_tensors(pair)
    result = {
        "checkpoints": [str(folder) for folder in pair],
        "config": changed,
        "only_in_one": missing,
        "tensors": len(tensors),
        "different": {name: values for name, values in tensors.items() if values["max_abs"] != 0.0},
    }
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        _print_diff(result)
    return 1 if result["different"] or missing else 0


def _compare_tensors(pair: Sequence[Path]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Per state of each tensor the largest absolute difference and the norms' ratio; one tensor in memory at a time."""
    import torch

    from megatron_bit.checkpoint.index import Rectangle
    from megatron_bit.checkpoint.load import open_reader

    readers = [open_reader(folder) for folder in pair]
    names = [set(reader.names()) for reader in readers]
    missing = sorted(names[0] ^ names[1])
    out = {}
    for name, state in sorted(names[0] & names[1]):
        shapes = [reader.shape(name) for reader in readers]
        if shapes[0] != shapes[1]:
            missing.append((name, f"{state}: {shapes[0]} and {shapes[1]}"))
            continue
        box = Rectangle((0,) * len(shapes[0]), shapes[0])
        x, y = (reader.read(name, state, box) for reader in readers)
        scale = torch.maximum(x.abs().max(), y.abs().max()).item()
        out[f"{name} {state}"] = {"max_abs": (x - y).abs().max().item(), "largest": scale}
    return out, [f"{name} {state}" for name, state in missing]


def _print_diff(result: dict[str, Any]) -> None:
    print("\n".join(result["checkpoints"]))
    for key, (one, other) in result["config"].items():
        print(f"  {key}: {shown(one)} -> {shown(other)}")
    for name in result["only_in_one"]:
        print(f"  only in one of them: {shown(name)}")
    different = sorted(result["different"].items(), key=lambda item: -item[1]["max_abs"])
    for name, values in different[:20]:
        print(f"  {shown(name)}: differs by up to {values['max_abs']:.3g} (largest value {values['largest']:.3g})")
    if len(different) > 20:
        print(f"  ... and {len(different) - 20} more")
    print(f"{result['tensors'] - len(different)} of {result['tensors']} tensors are equal to the bit")


def rm(run: Path, steps: Sequence[int], force: bool) -> int:
    """Delete checkpoints of a run by their steps; the newest only with `force`.

    Raises:
        UserError: no such checkpoint, the newest without force, or a job is training this run.
    """
    found = {step: folder for folder in resolve(run) if (step := folders.step_of(folder.name)) is not None}
    if not found:
        raise UserError(f"{run} is no run folder, and --step is a checkpoint of one; give the run")
    if unknown := [step for step in steps if step not in found]:
        raise UserError(f"{run} has no checkpoint of step {unknown[0]}; it has {', '.join(map(str, sorted(found)))}")
    newest = max(found)
    if newest in steps and not force:
        raise UserError(f"step {newest} is the newest checkpoint of {run}; --force deletes it all the same")
    lock = RunLock(run)
    try:
        lock.acquire()
        for step in steps:
            folders.remove(found[step])
            print(f"removed {found[step]}")
    except OSError as error:
        raise UserError(f"checkpoint {error.filename} cannot be removed: {error.strerror}") from None
    finally:
        lock.release()
    return 0
