"""Data folders that have a manifest and no shards: for what looks at a vocabulary alone, and imports no torch."""

from __future__ import annotations

from pathlib import Path

from megatron_bit.data.manifest import Manifest, Split


def bare(folder: Path, vocab_size: int = 4096, raw_bits: int = 0) -> Manifest:
    """Make such a folder."""
    splits = {"train": Split(()), "validation": Split(())}
    kind = "uint8" if raw_bits else "uint16"
    manifest = Manifest(
        folder, splits, "tokenizer.model", "0" * 64, vocab_size, 0, kind, {"inputs": []}, "0", raw_bits=raw_bits
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(manifest.to_json())
    return manifest
