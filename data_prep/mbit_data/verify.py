"""Compare every byte of a data folder with its manifest."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_bit.data.manifest import lengths_file, load_manifest
from megatron_bit.errors import UserError


def verify(folder: Path | str) -> list[str]:
    """One line for each damaged file: missing, of another size, or of another SHA-256. Empty if all is well.

    Raises UserError if the folder has no readable manifest.
    """
    manifest = load_manifest(folder, check_files=False)
    problems = []
    if not manifest.raw_bits:
        try:
            manifest.checked_tokenizer_path()
        except UserError as error:
            problems.append(str(error))
    for name, split in manifest.splits.items():
        for shard in split.shards:
            problem = _problem(manifest.shard_path(shard), shard.size, shard.sha256)
            if problem:
                problems.append(f"{name} shard {manifest.shard_path(shard)}: {problem}")
            lengths = manifest.folder / lengths_file(shard.file)
            problem = _problem(lengths, None, shard.lengths_sha256) if shard.lengths_sha256 else None
            if problem:
                problems.append(f"document lengths {lengths}: {problem}")
    return problems


def _problem(path: Path, size: int | None, sha256: str) -> str | None:
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            change = "truncated" if found < size else "too long"
            return f"{change}: {found} bytes, the manifest says {size}"
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if digest != sha256:
        return f"content changed: SHA-256 {digest}, the manifest says {sha256}"
    return None
