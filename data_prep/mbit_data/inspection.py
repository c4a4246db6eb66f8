"""What a data folder holds, for people: counts, document lengths, and samples with the bits of their first tokens."""

from __future__ import annotations

import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mbit_data.work import describe_dropped
from megatron_bit.data.manifest import Manifest, Shard, load_manifest
from megatron_bit.data.npy import decode_array
from megatron_bit.data.shard_file import ShardFile
from megatron_bit.data.tokenizer import Tokenizer
from megatron_bit.errors import UserError
from megatron_bit.io.strict_json import tree
from megatron_bit.io.text import shown

MAX_SHARDS = 8  # read for lengths, frequencies and samples: evenly spaced ones, so that any folder takes seconds
DECODED_TOKENS = 1_000_000  # decoded to count characters
BAR = 40  # columns


def inspect(
    folder: Path | str,
    split: str = "train",
    samples: int = 3,
    seed: int = 0,
    chars: int = 300,
    tokens: int = 8,
    bits: int | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """All that `render` shows, ready for JSON. Samples are drawn by `seed`; bits need `bits` or `code`.

    Raises UserError: no finished folder, no such split, a damaged shard, a vocabulary that `bits` cannot hold, no
    learned code for `code="semantic"`, `bits` or `code` of records.
    """
    manifest = load_manifest(folder)
    if manifest.raw_bits:
        if bits is not None or code is not None:
            raise UserError(f"{folder} holds records, whose bits are shown as they are; leave out --bits and --code")
        return _inspect_records(manifest, split, samples, seed, tokens)
    tokenizer = Tokenizer(manifest.checked_tokenizer_path())
    needed = max(1, (manifest.vocab_size - 1).bit_length())
    spell = None
    if bits is not None or code is not None:
        width = needed if bits is None else bits
        if not needed <= width <= 62:
            raise UserError(
                f"--bits {width} does not do for a vocabulary of {manifest.vocab_size}: allowed are {needed} to 62"
            )
        spell = _speller(code or "binary", manifest, width)
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    characters = decoded = 0

    def see(ids: np.ndarray) -> None:
        nonlocal counts, characters, decoded
        counts += np.bincount(ids, minlength=manifest.vocab_size)
        if decoded < DECODED_TOKENS:
            characters += len(tokenizer.decode(ids))
            decoded += len(ids)

    read, kept = _read(manifest, split, samples, seed, see)
    return {
        **_about(manifest),
        **read,
        "tokenizer": {
            "file": manifest.tokenizer_file,
            "kind": tokenizer.kind,
            "vocab_size": manifest.vocab_size,
            "eos_id": manifest.eos_id,
            "sha256": manifest.tokenizer_sha256,
        },
        "bits_needed": needed,
        "tokens_per_character": round(decoded / characters, 4) if characters else None,
        "unigram_entropy_bits": _entropy(counts),
        "samples": [_sample(about, ids, tokenizer, chars, tokens, spell) for about, ids in kept],
    }


def _inspect_records(manifest: Manifest, split: str, samples: int, seed: int, tokens: int) -> dict[str, Any]:
    """The same of raw records."""
    ones, total = np.zeros(manifest.raw_bits), 0

    def see(records: np.ndarray) -> None:
        nonlocal ones, total
        ones += np.unpackbits(records, axis=1, count=manifest.raw_bits).sum(0)
        total += len(records)

    read, kept = _read(manifest, split, samples, seed, see)
    share = ones / max(1, total)
    inside = share[(share > 0) & (share < 1)]
    return {
        **_about(manifest),
        **read,
        "raw_bits": manifest.raw_bits,
        "constant_bits": manifest.raw_bits - len(inside),
        "share_of_ones": [round(float(x), 4) for x in share],
        "independent_bits_entropy": round(
            float(-(inside * np.log2(inside) + (1 - inside) * np.log2(1 - inside)).sum()), 3
        ),
        "samples": [
            {
                "source": about.get("source"),
                "document": about.get("document"),
                "tokens": len(records),
                "first_tokens": [
                    {
                        "hex": record.tobytes().hex(),
                        "bits": "".join(map(str, np.unpackbits(record, count=manifest.raw_bits))),
                    }
                    for record in records[:tokens]
                ],
            }
            for about, records in kept
        ],
    }


def _about(manifest: Manifest) -> dict[str, Any]:
    """What the manifest says."""
    return {
        "folder": str(manifest.folder),
        "made_by": manifest.package_version,
        "options": dict(manifest.identity),
        "dtype": manifest.dtype,
        "dropped": dict(manifest.dropped),
        "splits": {
            name: {
                "documents": part.documents,
                "tokens": part.tokens,
                "shards": len(part.shards),
                "text_bytes": part.text_bytes,
                "bytes_per_token": round(part.text_bytes / part.tokens, 3) if part.tokens else None,
            }
            for name, part in manifest.splits.items()
        },
    }


def _read(
    manifest: Manifest, split: str, samples: int, seed: int, see: Callable[[np.ndarray], None]
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], np.ndarray]]]:
    """Documents of evenly spaced shards: what was read with their lengths, and `samples` of them, drawn by `seed`."""
    shards = _spread(manifest.split(split).shards)
    lengths: list[int] = []
    kept: list[tuple[dict[str, Any], np.ndarray]] = []
    choose = random.Random(seed)
    for shard in shards:
        for about, ids in _documents(manifest, shard):
            lengths.append(len(ids))
            see(ids)
            if len(kept) < samples:  # reservoir sampling
                kept.append((about, ids))
            elif samples and (place := choose.randrange(len(lengths))) < samples:
                kept[place] = (about, ids)
    read = {"split": split, "shards": len(shards), "documents": len(lengths)}
    return {"read": read, "lengths": _histogram(lengths)}, kept


def render(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    options = {k: v for k, v in report["options"].items() if k not in ("format_version", "tokenizer")}
    if records := "raw_bits" in report:
        what = f"records of {report['raw_bits']} bits, stored as bytes"
    else:
        tokenizer = report["tokenizer"]
        what = (
            f"tokenizer: {tokenizer['file']}, {tokenizer['vocab_size']:,} tokens, documents end with "
            f"{tokenizer['eos_id']}; stored as {report['dtype']}, {report['bits_needed']} bits a token needed"
        )
    lines = [
        f"{report['folder']}: made by megatron-bit {shown(report['made_by'])}",
        what,
        *(shown(f"{name}: {value}") for name, value in options.items()),
        f"left out: {describe_dropped(report['dropped']) or 'nothing'}",
    ]
    for name, split in report["splits"].items():
        rate = f", {split['bytes_per_token']:.2f} bytes a token" if split["tokens"] else ""
        lines.append(
            f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, {split['shards']:,} shards{rate}"
        )
    read = report["read"]
    total = report["splits"][read["split"]]
    lines.append("")
    if not read["documents"]:
        return "\n".join([*lines, f"the {read['split']} split is empty"])
    lines += [
        f"{read['documents']:,} of {total['documents']:,} {read['split']} documents read "
        f"({read['shards']} of {total['shards']} shards):",
        f"{report['constant_bits']} of the {report['raw_bits']} bits never change; entropy of the bits one by one "
        f"{report['independent_bits_entropy']:.2f} bits a record"
        if records
        else f"{report['tokens_per_character'] or 0:.3f} tokens a character, "
        f"unigram entropy {report['unigram_entropy_bits']:.2f} bits a token",
        "tokens in a document:",
    ]
    most = max(bin_["documents"] for bin_ in report["lengths"])
    for bin_ in report["lengths"]:
        bar = "#" * -(-BAR * bin_["documents"] // most)
        lines.append(f"  {bin_['from']:>9,} to {bin_['to']:>9,} {bin_['documents']:>9,} {bar}".rstrip())
    for sample in report["samples"]:
        lines += [
            "",
            f"--- {shown(sample['source'])}, document {shown(sample['document'])}: {sample['tokens']:,} tokens",
        ]
        if records:
            lines += [f"  {token['hex']}  {token['bits']}" for token in sample["first_tokens"]]
            continue
        lines.append(sample["text"])
        for token in sample["first_tokens"]:
            spelled = f"  {token['bits']}" if "bits" in token else ""
            lines.append(f"  {token['id']:>7}{spelled}  {token['text']!r}")
    return "\n".join(lines)


def _spread(shards: tuple[Shard, ...]) -> list[Shard]:
    if len(shards) <= MAX_SHARDS:
        return list(shards)
    return [shards[i * (len(shards) - 1) // (MAX_SHARDS - 1)] for i in range(MAX_SHARDS)]


def _documents(manifest: Manifest, shard: Shard) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """(metadata, token ids) of each document; the metadata stands in front of the tokens."""
    path = manifest.shard_path(shard)
    about: dict[str, Any] = {}
    try:
        with open(path, "rb") as file:
            for name, data in ShardFile(file, shard.size, hashed=False).members():
                if name.endswith(".json"):
                    about = tree(data)
                    if not isinstance(about, dict):
                        raise ValueError(f"{name} holds no JSON object")
                    continue
                ids = decode_array(data)
                if not manifest.raw_bits and len(ids) and int(ids.max()) >= manifest.vocab_size:
                    raise ValueError(f"token {int(ids.max())} is outside the vocabulary of {manifest.vocab_size}")
                yield about, ids
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise UserError(f"shard {path} is damaged: {error}; `megatron-bit data verify {manifest.folder}`") from error


def _sample(
    about: dict[str, Any], ids: np.ndarray, tokenizer: Tokenizer, chars: int, tokens: int, spell: Any
) -> dict[str, Any]:
    first = [int(token) for token in ids[:tokens]]
    words = spell(first) if spell else [None] * len(first)
    return {
        "source": about.get("source"),
        "document": about.get("document"),
        "tokens": len(ids),
        "text": tokenizer.decode(ids[: 8 * chars + 8])[:chars],  # no need to decode a book
        "first_tokens": [
            {"id": token, "text": tokenizer.decode([token]), **({"bits": word} if word is not None else {})}
            for token, word in zip(first, words, strict=True)
        ],
    }


def _speller(code: str, manifest: Manifest, bits: int) -> Any:
    import torch

    from megatron_bit.model.codec import Codec, learned_table

    codec = Codec(code, manifest.vocab_size, bits, learned_table(code, manifest, bits))

    def spell(ids: list[int]) -> list[str]:
        rows = codec.encode(torch.tensor(ids, dtype=torch.int64))
        return ["".join("1" if bit > 0 else "0" for bit in row) for row in rows.tolist()]

    return spell


def _entropy(counts: np.ndarray) -> float | None:
    """Bits a token if each were drawn alone, by its frequency."""
    share = counts[counts > 0] / max(1, counts.sum())
    return round(float(-(share * np.log2(share)).sum()), 3) if len(share) else None


def _histogram(lengths: list[int]) -> list[dict[str, int]]:
    """Documents by length, in bins that double: 1, 2 to 3, 4 to 7, ..."""
    if not lengths:
        return []
    bins = np.bincount([max(1, length).bit_length() - 1 for length in lengths])
    first = int(np.flatnonzero(bins)[0])
    return [{"from": 1 << i, "to": (2 << i) - 1, "documents": int(bins[i])} for i in range(first, len(bins))]
