"""Checkpoint folders: what makes one complete, whether it is undamaged, and which may go. Imports no torch.

    RUN/checkpoints/step-00001000/
        rank-00000.safetensors ...  optimizer state, as rectangles of logical tensors (index.py)
        index.json                  which rectangle is where
        meta.json                   counters, configuration, identity
        hashes.json                 SHA-256 and size of every file above
        COMMITTED                   SHA-256 of hashes.json, written last

A save happens in `step-00001000.tmp`, and its name loses the suffix by one rename when all of this is on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from megatron_bit.errors import UserError
from megatron_bit.io.files import sync_folder, write_synced
from megatron_bit.run import checkpoint_schema as schema

FORMAT = 2
TEMPORARY, REPLACED, DELETED = ".tmp", ".replaced", ".deleted"


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's name: `step-00000010` is 10. None for any other name, such as that of a copy
    (`step-00000010-good`) or of a save that has not ended."""
    match = re.fullmatch(r"step-(\d{8}|[1-9]\d{8,17})", name, re.ASCII)
    return None if match is None else int(match[1])


def in_order(names: Iterable[str]) -> list[str]:
    """Of these names those of checkpoints, by their steps: as text 100,000,000 would come before 99,999,999."""
    steps = ((step_of(name), name) for name in names)
    return [name for _, name in sorted((step, name) for step, name in steps if step is not None)]


def complete(root: Path) -> list[Path]:
    """Committed checkpoints of a run, oldest first. What lies there under another name is left alone."""
    if not root.is_dir():
        return []
    return [root / name for name in in_order(os.listdir(root)) if (root / name / "COMMITTED").exists()]


def newest_step(root: Path) -> int:
    """Step of a run's newest committed checkpoint; 0 without one."""
    found = complete(root)
    return 0 if not found else step_of(found[-1].name) or 0


def newest_until(root: Path, step: int) -> Path | None:
    """The newest committed checkpoint of at most this step."""
    found = [folder for folder in complete(root) if (step_of(folder.name) or 0) <= step]
    return found[-1] if found else None


def checkpoints_of(target: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first, or `target` itself, if it is one; UserError if there are none."""
    if (target / "COMMITTED").exists():
        return [target]
    found = complete(target / "checkpoints")
    if not found:
        where = target / "checkpoints"
        raise UserError(f"{target} has no complete checkpoint in {where}; train first, or give another run")
    return found


def read_meta(folder: Path) -> dict[str, Any]:
    """The checkpoint's meta.json; UserError if it is not one of ours."""
    found = schema.read(folder, "meta.json", schema.FORMAT_ALONE)["format"]
    if found != FORMAT:
        raise UserError(f"checkpoint {folder / 'meta.json'} has format {found}; this version reads {FORMAT}")
    return schema.read(folder, "meta.json", schema.META)


def problems(
    folder: Path, share: int = 0, shares: int = 1, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """What is wrong with a committed checkpoint: one line for every missing, cut or changed file.

    Args:
        share, shares: look at every `shares`-th file only, from the `share`-th; the ranks of a job divide the work.
        progress: called with (bytes looked at, bytes in all) before every file.
    """
    try:
        text = (folder / "hashes.json").read_bytes()
        if (folder / "COMMITTED").read_text().strip() != hashlib.sha256(text).hexdigest():
            return [f"{folder / 'hashes.json'} does not have the hash that COMMITTED gives"]
        files = schema.check(text, f"checkpoint {folder}", "hashes.json", schema.HASHES)
    except UserError as error:
        return [str(error)]
    except (OSError, ValueError) as error:
        return [f"{folder} is incomplete: {error}"]
    found: list[str] = []
    mine, done = sorted(files.items())[share::shares], 0
    total = sum(expected["bytes"] for _, expected in mine)
    for name, expected in mine:
        path = folder / name
        progress(done, total)
        done += expected["bytes"]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                found.append(f"{path} has {size} bytes instead of {expected['bytes']}")
                continue
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    found.append(f"{path} has changed since it was written: its SHA-256 is another one")
        except OSError as error:
            found.append(f"{path} cannot be read: {error.strerror}")
    return found


def check_undamaged(folder: Path) -> None:
    """Hash every file, and say on stderr how far that is if it takes a while; UserError if one is missing, cut or
    changed."""
    begin = last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 2.0:
            last = time.monotonic()
            left = (last - begin) * (total - done) / max(1, done)
            print(f"hashing {folder}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, ETA {left:.0f} s", file=sys.stderr)

    found = problems(folder, progress=progress)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(
            f"checkpoint {folder} is damaged: {found[0]}{more}; restore it, or give an older one: `megatron-bit "
            "checkpoint verify` says which are whole"
        )


def size(folder: Path) -> int:
    """Bytes of all its files."""
    return sum(path.stat().st_size for path in folder.iterdir())


# ---------------------------------------------------------------- saving
def fresh(folder: Path, needed: int) -> None:
    """An empty folder to save `needed` bytes in; UserError if it cannot be made or the disk is too full."""
    try:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed save has left
        folder.mkdir()  # and not its parents: a run folder that is gone does not come back by itself
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"checkpoint folder {folder} cannot be made: {error.strerror}") from None
    if free < needed:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise UserError(
            f"{folder.parent} has {free / 2**20:,.1f} MiB free, and a checkpoint takes {needed / 2**20:,.1f} MiB; "
            "make room, or lower checkpoint.keep"
        )


def _write(path: Path, text: str) -> dict[str, Any]:
    """Write and sync a small file; returns its entry for hashes.json."""
    data = text.encode()
    write_synced(path, data)
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def commit(
    temporary: Path,
    final: Path,
    index: dict[str, Any],
    files: dict[str, Any],
    meta: Mapping[str, Any],
    wanted: AbstractContextManager[None] | None = None,
) -> None:
    """Write index, meta, hashes and mark, and rename: from here on the checkpoint is there. Raises OSError.

    Args:
        index, files: what `join` returned.
        wanted: entered around the renames; raises if the save was given up meanwhile, which then cannot happen.
    """
    files = dict(files)
    files["index.json"] = _write(temporary / "index.json", json.dumps(index))
    files["meta.json"] = _write(temporary / "meta.json", json.dumps({**meta, "format": FORMAT}, indent=1))
    mark = _write(temporary / "hashes.json", json.dumps(files, indent=1))
    _write(temporary / "COMMITTED", mark["sha256"])
    sync_folder(temporary)
    put_in_place(temporary, final, wanted or contextlib.nullcontext())


def put_in_place(temporary: Path, final: Path, wanted: AbstractContextManager[None]) -> None:
    """Give a whole checkpoint its name; one of that name goes when the new one is there. Raises OSError.

    What stands there was saved before the run went back, or is not complete. `sweep` mends a crash between the renames.
    """
    replaced = final.with_suffix(REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    with wanted:
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def join(temporary: Path, ranks: int, go_on: Callable[[], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Wait for the part files of all ranks, which say that they have written; returns (index, files) and deletes them.

    Raises:
        UserError: `go_on` said no while a part was missing.
    """
    index: dict[str, Any] = {}
    files: dict[str, Any] = {}
    for rank in range(ranks):
        part = temporary / f"rank-{rank:05d}.json"
        while not part.exists():
            if not go_on():
                raise UserError(f"{part} of rank {rank} did not come; all ranks have to see {temporary.parent}")
            time.sleep(0.02)
        said = json.loads(part.read_text())
        files.update(said["files"])
        for name, entry in said["index"].items():
            target = index.setdefault(name, {"shape": entry["shape"], "states": {}})
            for state, rectangles in entry["states"].items():
                target["states"].setdefault(state, []).extend(rectangles)
    for rank in range(ranks):
        (temporary / f"rank-{rank:05d}.json").unlink()
    return index, files


# ---------------------------------------------------------------- tidying
def sweep(root: Path) -> Iterator[str]:
    """Clear what killed saves have left, and put back a checkpoint whose replacement did not arrive.

    Yields one line for each. Only for the one process that owns the run.
    """
    for folder in sorted(root.glob("step-*.*")):
        final = root / re.sub(r"(\.\d+)?\.[a-z]+$", "", folder.name)  # the number: of a save after one was given up
        if step_of(final.name) is None:
            continue  # a copy of somebody's
        if folder.suffix == REPLACED and not final.exists():
            folder.rename(final)
            yield f"put back {final}: it was being replaced when the run ended"
        elif folder.suffix in (TEMPORARY, REPLACED, DELETED):
            shutil.rmtree(folder, ignore_errors=True)
            yield f"removed {folder}, left by a save that did not end"


def remove(folder: Path) -> None:
    """Delete a checkpoint; half deleted, it does not look complete."""
    deleted = folder.with_suffix(DELETED)
    shutil.rmtree(deleted, ignore_errors=True)
    folder.rename(deleted)
    shutil.rmtree(deleted, ignore_errors=True)


def superfluous(names: Sequence[str], keep: int, keep_every: int) -> list[str]:
    """Of checkpoints' names as `in_order` gives them: all but the newest `keep`, those at multiples of `keep_every` (0:
    none) and the untrained one."""
    steps = {name: step_of(name) for name in names[:-keep]}
    return [name for name, step in steps.items() if step and not (keep_every and step % keep_every == 0)]


def prune(root: Path, keep: int, keep_every: int, needed: Collection[Path] = ()) -> None:
    """Delete what is superfluous and not needed."""
    for name in superfluous([folder.name for folder in complete(root)], keep, keep_every):
        if root / name not in needed:
            remove(root / name)


def names(folders: Sequence[Path]) -> str:
    """The last few names, for a message."""
    shown = ", ".join(folder.name for folder in folders[-4:])
    return shown if len(folders) <= 4 else f"..., {shown}"
