"""Learned codes as files of a data folder: `codes/semantic-<bits>.safetensors`, written and read here only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_bit.data.fit import code_path, missing_code
from megatron_bit.data.manifest import Manifest
from megatron_bit.errors import UserError
from megatron_bit.io.files import PARTIAL, sync_folder
from megatron_bit.io.strict_json import tree

FORMAT = "megatron_bit.code"
VERSION = "1"
TABLE = "table"


@dataclass(frozen=True)
class LearnedCode:
    """A table of codes and what it was learned from."""

    table: np.ndarray  # int8 [V, B] of -1 and +1, all rows distinct; the first bit in column 0
    tokenizer_sha256: str
    options: Mapping[str, Any]  # all that decides the table: the data's fingerprint, seed, sweeps, tokens


def load_code(manifest: Manifest, bits: int) -> LearnedCode:
    """The learned code of a data folder. Raises UserError: none there, damaged, of another tokenizer or size."""
    path = code_path(manifest.folder, bits)
    if manifest.remote is not None:
        with contextlib.suppress(FileNotFoundError):
            manifest.remote.copy(str(path.relative_to(manifest.folder)))
    if not path.exists():
        raise missing_code(manifest, bits)
    return read_code(path, manifest, bits)


def read_code(path: Path, manifest: Manifest, bits: int | None = None) -> LearnedCode:
    """The code in a file, checked against the folder's tokenizer (and `bits`). Raises UserError as `load_code`."""
    from safetensors import SafetensorError, safe_open

    again = f"`megatron-bit codes {manifest.folder}{'' if bits is None else f' --bits {bits}'} --force`"
    try:
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            table = file.get_tensor(TABLE)
        if about.get("format") != FORMAT or about.get("version") != VERSION:
            raise ValueError(f"format {about.get('format')!r} version {about.get('version')!r}")
        options = tree(about["options"].encode())
        if not isinstance(options, dict):
            raise ValueError("its options are no object")
        intact = about["table_sha256"] == _digest(table)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a code ({error}); make it again with {again}") from error
    if about.get("tokenizer_sha256") != manifest.tokenizer_sha256:
        raise UserError(f"{path} is of another tokenizer than {manifest.tokenizer_path}; make it again with {again}")
    if not intact:
        raise UserError(f"{path} is damaged: its table has another SHA-256 than it says; make it again with {again}")
    wanted = (manifest.vocab_size, table.shape[-1] if bits is None else bits)
    if table.shape != wanted:
        raise UserError(
            f"{path} has {' x '.join(map(str, table.shape))} bits, wanted are {wanted[0]} tokens x {wanted[1]}; "
            f"make it again with {again}"
        )
    check_table(table, str(path))
    return LearnedCode(table, manifest.tokenizer_sha256, options)


def check_table(table: np.ndarray, where: str) -> None:
    """UserError if it is not int8 of -1 and +1, or two tokens have the same bits."""
    if table.dtype != np.int8 or table.ndim != 2 or not np.isin(table, (-1, 1)).all():
        raise UserError(f"{where}: not a table of int8 -1 and +1")
    distinct = len(np.unique(np.packbits(table > 0, axis=1), axis=0))
    if distinct != len(table):
        raise UserError(f"{where}: {len(table)} tokens share {distinct} codes")


def write_code(path: Path, code: LearnedCode) -> None:
    """The file appears complete or not at all; the same code gives the same bytes. Raises OSError."""
    import torch

    from megatron_bit.io.safetensors_file import Spec, write_file  # the library's writer orders metadata by chance

    check_table(code.table, "code")
    about = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer_sha256": code.tokenizer_sha256,
        "table_sha256": _digest(code.table),
        "options": json.dumps(code.options, sort_keys=True),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    spec = Spec(TABLE, tuple(code.table.shape), torch.int8)
    write_file(partial, [spec], [torch.from_numpy(np.ascontiguousarray(code.table))], metadata=about)
    os.replace(partial, path)
    sync_folder(path.parent)


def table_of(words: np.ndarray, bits: int) -> np.ndarray:
    """int64 [V] codes to int8 [V, bits] of -1 and +1, the highest bit first, as model.codec has them."""
    return (((words[:, None] >> np.arange(bits - 1, -1, -1)) & 1) * 2 - 1).astype(np.int8)


def _digest(table: np.ndarray) -> str:
    return hashlib.sha256(f"{table.shape}".encode() + np.ascontiguousarray(table).tobytes()).hexdigest()
