#!/usr/bin/env python3
"""Leaves a CUDA library with the machine code of one GPU architecture.

    python scripts/fatbin.py libtransformer_engine.so small.so 90

A library holds its device code in the section .nv_fatbin: containers (magic, version, header size, size), each with an
entry for every architecture. The entries to keep move to the front of their container and the rest becomes zeros, so
that no address in the library changes; its size does not either, but zeros compress to nothing.
"""

from __future__ import annotations

import mmap
import shutil
import struct
import sys
from pathlib import Path

SECTION = b".nv_fatbin"
MAGIC = 0xBA55ED50
_CONTAINER = struct.Struct("<IHHQ")  # magic, version, size of this header, size of the entries
_ENTRY = struct.Struct("<HHIQ")  # kind (1 PTX, 2 ELF), version, size of this header, size of the code
_ARCHITECTURE = 28  # offset in an entry's header, uint32: 90 for sm_90


def keep(source: Path, target: Path, architecture: int) -> tuple[int, int]:
    """Copies the library with this architecture's code only; bytes of device code before and after.

    ValueError if the file has no device code, or a container has none for this architecture.
    """
    shutil.copyfile(source, target)
    before = after = 0
    with target.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        offset, size = _section(data)
        for start, end in _containers(data, offset, offset + size):
            entries = list(_entries(data, start, end))
            kept = b"".join(data[a:b] for a, b, found in entries if found == architecture)
            if not kept:
                offered = sorted({found for *_, found in entries})
                raise ValueError(f"{source} has no code for sm_{architecture} in a container that has {offered}")
            magic, version, header, length = _CONTAINER.unpack_from(data, start)
            _CONTAINER.pack_into(data, start, magic, version, header, len(kept))
            data[start + header : end] = kept.ljust(length, b"\0")
            before, after = before + length, after + len(kept)
    return before, after


def architectures(library: Path) -> dict[int, int]:
    """Bytes of device code by architecture."""
    sizes: dict[int, int] = {}
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        offset, size = _section(data)
        for start, end in _containers(data, offset, offset + size):
            for a, b, found in _entries(data, start, end):
                sizes[found] = sizes.get(found, 0) + b - a
    return sizes


def _section(data: mmap.mmap) -> tuple[int, int]:
    """Offset and size of .nv_fatbin in a 64-bit ELF file."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a little-endian 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * entry) for i in range(count)]
    texts = headers[names][4]
    for name, _, _, _, offset, size in headers:
        if data[texts + name : texts + name + len(SECTION) + 1] == SECTION + b"\0":
            return offset, size
    raise ValueError("no section .nv_fatbin: no device code in it")


def _containers(data: mmap.mmap, offset: int, end: int):
    """(start, end) of each; they begin at multiples of eight bytes."""
    while offset + _CONTAINER.size <= end:
        magic, _, header, size = _CONTAINER.unpack_from(data, offset)
        if magic != MAGIC:
            offset += 8
            continue
        yield offset, offset + header + size
        offset += -(-(header + size) // 8) * 8


def _entries(data: mmap.mmap, start: int, end: int):
    """(start, end, architecture) of each entry of a container."""
    offset = start + _CONTAINER.unpack_from(data, start)[2]
    while offset < end:
        _, _, header, size = _ENTRY.unpack_from(data, offset)
        (architecture,) = struct.unpack_from("<I", data, offset + _ARCHITECTURE)
        yield offset, offset + header + size, architecture
        offset += header + size


if __name__ == "__main__":
    given, made, which = sys.argv[1:]
    whole, left = keep(Path(given), Path(made), int(which))
    print(f"{made}: {left / 2**20:.1f} of {whole / 2**20:.1f} MiB of device code")
