"""Save: every rank writes the optimizer state it owns, then rank 0 commits."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_bit.checkpoint.index import FORMAT, owned_rectangles
from megatron_bit.errors import UserError
from megatron_bit.files import sync_folder
from megatron_bit.model.logical import pieces
from megatron_bit.optim.optimizer import STATES, Optimizer
from megatron_bit.parallel.agree import on_every_rank, on_rank0
from megatron_bit.parallel.groups import Groups


def save(root: Path, step: int, meta: dict[str, Any], optimizer: Optimizer, groups: Groups) -> Path:
    """Write `root/step-XXXXXXXX`; it appears under that name complete, or not at all. All ranks call it.

    Raises:
        UserError: on all ranks, if any of them cannot write.
    """
    final = root / f"step-{step:08d}"
    temporary = root / f"{final.name}.tmp"
    on_rank0(lambda: _fresh(temporary))
    on_every_rank(lambda: _write_rank(temporary, optimizer, groups))
    on_rank0(lambda: _commit(temporary, final, {**meta, "format": FORMAT, "step": step}))
    return final


def _fresh(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed save has left
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"checkpoint folder {folder} cannot be made: {error.strerror}") from None


def _write_rank(folder: Path, optimizer: Optimizer, groups: Groups) -> None:
    file = f"rank-{groups.rank:05d}.safetensors"
    tensors: dict[str, Tensor] = {}
    index: dict[str, Any] = {}
    layout = [pieces(chunk, groups) for chunk in optimizer.chunks]
    for fragment in optimizer.fragments():
        if not fragment.saved:
            continue
        for part in layout[fragment.chunk][fragment.name]:
            if part.full_shape == part.shape and groups.tp_rank > 0:
                continue  # replicated over TP: the first rank writes it
            count = fragment.states["param"].numel()
            for at, place in owned_rectangles(part, fragment.start, count):
                entry = index.setdefault(part.name, {"shape": part.full_shape, "states": {s: [] for s in STATES}})
                for state in STATES:
                    key = f"{part.name}/{state}/{'-'.join(map(str, place.offset))}"
                    view = fragment.states[state].detach().narrow(0, at, place.numel).view(place.shape)
                    tensors[key] = view.clone() if view.device.type == "cpu" else view.cpu()
                    entry["states"][state].append(
                        {"file": file, "key": key, "offset": place.offset, "shape": place.shape}
                    )
    try:
        save_file(tensors, str(folder / file))
        _settle(folder / file)
        _write(folder / f"rank-{groups.rank:05d}.json", json.dumps(index))
    except Exception as error:  # safetensors wraps OSError in its own exception
        raise UserError(f"checkpoint file {folder / file} cannot be written: {error}") from None


def _commit(temporary: Path, final: Path, meta: dict[str, Any]) -> None:
    merged: dict[str, Any] = {}
    for rank in range(dist.get_world_size()):
        part = temporary / f"rank-{rank:05d}.json"
        for name, entry in json.loads(part.read_text()).items():
            target = merged.setdefault(name, {"shape": entry["shape"], "states": {s: [] for s in STATES}})
            for state in STATES:
                target["states"][state].extend(entry["states"][state])
        part.unlink()
    try:
        _write(temporary / "index.json", json.dumps(merged))
        _write(temporary / "meta.json", json.dumps(meta, indent=1))
        _write(temporary / "COMMITTED", "")
        sync_folder(temporary)
        replaced = final.with_suffix(".replaced")
        if final.exists():  # the same step of this run, saved before: it goes when the new one is there
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        sync_folder(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise UserError(f"checkpoint {final} cannot be committed: {error.strerror}") from None


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints, and the untrained one. Rank 0 calls it."""
    from megatron_bit.checkpoint.load import complete

    for folder in complete(root)[:-keep]:
        if folder.name == "step-00000000":
            continue
        deleted = folder.with_suffix(".deleted")  # half-deleted, it must not look complete
        folder.rename(deleted)
        shutil.rmtree(deleted, ignore_errors=True)


def _settle(path: Path) -> None:
    """safetensors leaves a private file in the page cache: give it the user's usual mode, and sync it."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
