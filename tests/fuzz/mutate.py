"""What happens to files on their way from one person to another, and what somebody does to them on purpose."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from pathlib import Path
from typing import Any

import yaml

JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, -0.0, 1e300, float("nan"), float("inf"), 2**31, 2**53, 2**60, 2**63, 2**70, "",
    "x", "a\0b", "..", "../../x", "/etc/hostname", "~", "\x1b[31mred", "line\nbreak", "12", "-rf", "pipe:touch pwned",
    "http://127.0.0.1:9/x", "${HOME}", "\u202e", "a" * 5000, "a" * 64, [], {}, [1], {"a": 1}, [[]], [None], [0] * 2000,
]  # fmt: skip


def deep(levels: int = 100_000) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


def damage(data: bytes, choose: random.Random) -> bytes:
    """Bytes that were flipped, cut, doubled or replaced."""
    at, other = (choose.randrange(len(data) + 1) for _ in range(2))
    begin, end = sorted((at, other))
    way = choose.randrange(8)
    if way == 0 and data:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << choose.randrange(8)]) + data[at + 1 :]
    if way == 1:
        return data[:at]
    if way == 2:
        return data[:end] + data[begin:end] + data[end:]
    if way == 3:
        return data[:begin] + data[end:]
    if way == 4:
        return data[:at] + choose.randbytes(16) + data[at + 16 :]
    if way == 5:
        return b""
    return deep() if way == 6 else bytes(len(data))


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node[:50]) if isinstance(node, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def change(tree: Any, choose: random.Random) -> Any:
    """One value somewhere is another, is gone, or has got a neighbour."""
    where = choose.choice(places(tree))
    value = choose.choice(JUNK)
    if not where:
        return value
    node = tree
    for part in where[:-1]:
        node = node[part]
    way = choose.randrange(10)
    if way == 0:
        del node[where[-1]]
    elif way == 1 and isinstance(node, dict):
        node[choose.choice(["", "x", "..", "a\0b", "\x1b[2J", "__class__"])] = value
    elif way == 2 and isinstance(node[where[-1]], int):
        node[where[-1]] += choose.choice([-1, 1, 2**32, -(2**32)])
    else:
        node[where[-1]] = value
    return tree


def mutate(path: Path, choose: random.Random) -> bool:
    """Change one file in the way that suits it; whether the sums beside it or in it were made anew, as is the rule."""
    data = path.read_bytes()
    if choose.random() < 0.35:
        path.write_bytes(damage(data, choose))
    elif path.suffix == ".safetensors":
        path.write_bytes(_header(data, choose))
    elif path.suffix == ".json":
        tree = change(json.loads(data), choose)
        path.write_text(json.dumps(tree))
    elif path.suffix == ".jsonl":
        lines = data.splitlines()
        at = choose.randrange(len(lines))
        lines[at] = json.dumps(change(json.loads(lines[at]), choose)).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
    elif path.suffix in (".yaml", ".yml"):
        path.write_text(yaml.safe_dump(change(yaml.safe_load(data), choose)))
    else:
        path.write_bytes(damage(data, choose))
    if choose.random() < 0.75:
        sums_anew(path)
        return True
    return False


def _header(data: bytes, choose: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    if choose.random() < 0.2:
        return struct.pack("<Q", choose.choice([0, 1, length + 1, 2**31, 2**60, 2**64 - 1])) + data[8:]
    header = json.dumps(change(json.loads(data[8 : 8 + length]), choose)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def sums_anew(path: Path) -> None:
    """So that what was changed is not found by its sum alone."""
    folder = path.parent
    hashes, manifest = folder / "hashes.json", folder / "manifest.json"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if hashes.exists() and path != hashes:
        known = json.loads(hashes.read_bytes())
        if path.name in known:
            known[path.name] = {"sha256": digest, "bytes": path.stat().st_size}
            hashes.write_text(json.dumps(known))
    committed = folder / "COMMITTED"
    if hashes.exists() and committed.exists() and path != committed:
        text = committed.read_text()
        old = [word for word in text.replace('"', " ").split() if len(word) == 64]
        for word in old[:1]:
            committed.write_text(text.replace(word, hashlib.sha256(hashes.read_bytes()).hexdigest()))
    if manifest.exists():
        try:
            content = json.loads(manifest.read_bytes())
            if path.name == content["tokenizer"]["file"]:
                content["tokenizer"]["sha256"] = digest
            for split in content["splits"].values():
                for shard in split["shards"]:
                    if shard["file"] == path.name:
                        shard |= {"sha256": digest, "size": path.stat().st_size}
                    if shard["file"].removesuffix(".tar") + ".lengths.npy" == path.name:
                        shard["lengths_sha256"] = digest
            known = {
                "version": content["version"],
                "dtype": content["dtype"],
                "vocab_size": content["vocab_size"],
                "eos_id": content["eos_id"],
                "tokenizer": content["tokenizer"]["sha256"],
                "splits": {
                    name: [[shard["file"], shard["tokens"], shard["sha256"]] for shard in split["shards"]]
                    for name, split in content["splits"].items()
                },
            }
            if content.get("raw_bits"):
                known["raw_bits"] = content["raw_bits"]
            content["fingerprint"] = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
            manifest.write_text(json.dumps(content))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return  # it is past that
