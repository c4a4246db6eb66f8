"""Learned codes: which bits each token gets, from the text of a data folder; and codes held against each other."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mbit_data.lock import only_one
from mbit_data.progress import Reporter
from megatron_bit.data.codes import LearnedCode, read_code, table_of, write_code
from megatron_bit.data.fit import LEARNED, code_path
from megatron_bit.data.manifest import Manifest, load_manifest
from megatron_bit.errors import UserError

if TYPE_CHECKING:
    from mbit_data.bigrams import Bigrams

METHOD = "anneal-2"  # change it when the same options give another table
GROUPS = (1, 4, 5, 8)  # bits decided together, of the comparison
HELD_OUT = 2_000_000  # tokens of the validation split that are looked at


@dataclass(frozen=True)
class CodeOptions:
    """What decides a learned code, beside the data."""

    bits: int | None = None  # the fewest that hold the vocabulary
    tokens: int = 20_000_000  # of the training split to count
    sweeps: int | None = None  # of the search; None: `default_sweeps`
    seed: int = 0

    def check(self, vocab_size: int) -> int:
        """The number of bits. Raises UserError."""
        from mbit_data.anneal import MAX_BITS

        needed = fewest_bits(vocab_size)
        bits = needed if self.bits is None else self.bits
        if not needed <= bits <= MAX_BITS:
            raise UserError(
                f"--bits {bits} does not do for a vocabulary of {vocab_size}: allowed are {needed} to {MAX_BITS}"
            )
        for name, value, least in (("tokens", self.tokens, 1), ("sweeps", self.sweeps, 1), ("seed", self.seed, 0)):
            if value is not None and value < least:
                raise UserError(f"--{name} {value} has to be at least {least}")
        return bits


def fewest_bits(vocab_size: int) -> int:
    """ceil(log2 V)."""
    return max(1, (vocab_size - 1).bit_length())


def default_sweeps(vocab_size: int) -> int:
    """One minute on one core for 4,096 tokens, two for 32,000 (docs/codes.md)."""
    return int(np.clip(2_500_000 // vocab_size, 300, 1000))


def learn(
    folder: Path | str, options: CodeOptions, out: Path | None = None, force: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Make the learned code of a data folder, or find it made from the same data and options.

    Returns what was done: path, bits, options, whether it was there, seconds. Raises UserError: no data folder, options
    that do not fit it, another code at the same place (unless `force`), a folder that cannot be written.
    """
    report, begin = Reporter(progress), time.monotonic()
    manifest = load_manifest(folder)
    manifest.need_vocabulary("a learned code")
    bits = options.check(manifest.vocab_size)
    path = code_path(manifest.folder, bits) if out is None else out
    about = {
        "method": METHOD,
        "data": manifest.fingerprint,
        "bits": bits,
        "tokens": options.tokens,
        "sweeps": options.sweeps or default_sweeps(manifest.vocab_size),
        "seed": options.seed,
    }
    result = {"path": str(path), "vocab_size": manifest.vocab_size, "bits": bits, "options": about}
    try:
        with only_one(manifest.folder, report) as check:
            if path.exists() and not force:
                _same(path, manifest, bits, about)
                return {**result, "made": False, "seconds": 0.0}
            code = LearnedCode(_search(manifest, bits, about, report), manifest.tokenizer_sha256, about)
            check()
            if path.exists() and not force:  # by somebody where no lock holds
                _same(path, manifest, bits, about)
            write_code(path, code)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; name another file with --out") from error
    return {**result, "made": True, "seconds": round(time.monotonic() - begin, 1)}


def _same(path: Path, manifest: Manifest, bits: int, about: dict[str, Any]) -> None:
    there = read_code(path, manifest, bits).options
    different = [f"{k} ({there.get(k)} there, {about[k]} here)" for k in about if there.get(k) != about[k]]
    if different:
        raise UserError(
            f"{path} is another code: {'; '.join(different)}; runs that use it could not go on with a new one. "
            "Replace it with --force, or write elsewhere with --out"
        )


def _search(manifest: Manifest, bits: int, about: dict[str, Any], report: Reporter) -> np.ndarray:
    from mbit_data.anneal import anneal

    pairs = _count(manifest, about["tokens"], report)
    with report.steps("searching codes", about["sweeps"]) as step:
        words = anneal(pairs, bits, about["sweeps"], about["seed"], step)
    return table_of(words, bits)


def _count(manifest: Manifest, tokens: int, report: Reporter) -> Bigrams:
    from mbit_data.bigrams import chosen_shards, count_bigrams

    size = sum(shard.size for shard in chosen_shards(manifest, "train", tokens))
    with report.bar("counting pairs of tokens", size) as advance:
        pairs = count_bigrams(manifest, "train", tokens, advance)
    rare = f", {pairs.dropped:,} rare ones left out" if pairs.dropped else ""
    report.line(f"{len(pairs.count):,} distinct pairs in {pairs.tokens:,} tokens{rare}")
    return pairs


def compare(folder: Path | str, options: CodeOptions, more: tuple[Path, ...] = (), progress: bool = True) -> dict:
    """What binary, gray, random, the folder's learned code and those of the files `more` cost on held-out text.

    Returns bits, nats of a token, and for each code nats by the size of its groups. Raises UserError as `learn`.
    """
    from mbit_data.bigrams import BitCost, count_bigrams, group_sizes
    from megatron_bit.model.codec import CODES, Codec

    report = Reporter(progress)
    manifest = load_manifest(folder)
    manifest.need_vocabulary("a learned code")
    bits = options.check(manifest.vocab_size)
    learned = code_path(manifest.folder, bits)
    files = [*([learned] if learned.exists() else []), *more]
    tables = {name: Codec(name, manifest.vocab_size, bits).table.numpy() for name in CODES}
    tables |= {LEARNED if path == learned else str(path): read_code(path, manifest).table for path in files}
    train = _count(manifest, options.tokens, report)
    held_out = count_bigrams(manifest, "validation", HELD_OUT)
    cost = BitCost(train, held_out)
    groups = [g for i, g in enumerate(GROUPS) if group_sizes(bits, g) not in [group_sizes(bits, h) for h in GROUPS[:i]]]
    with report.steps("measuring codes", len(tables)) as step:
        rows = {}
        for name, table in tables.items():
            rows[name] = {str(group): round(value, 4) for group, value in cost.row(table, groups).items()}
            step()
    return {
        "folder": str(manifest.folder),
        "bits": bits,
        "train_tokens": train.tokens,
        "held_out_tokens": held_out.tokens,
        "token_nats": round(cost.token, 4),
        "codes": rows,
        "learned": learned.exists(),
    }


def render(report: dict[str, Any]) -> str:
    """The comparison as lines of text."""
    groups = list(next(iter(report["codes"].values())))
    width = max(len(name) for name in report["codes"])
    lines = [
        f"{report['folder']}: {report['bits']} bits; a token given the one before: {report['token_nats']:.3f} nats "
        f"({report['held_out_tokens']:,} held-out tokens, bigram of {report['train_tokens']:,})",
        "nats a token more, if groups of so many bits are decided apart:",
        f"{'code':<{width}}" + "".join(f"{group:>8}" for group in groups),
    ]
    for name, row in report["codes"].items():
        lines.append(f"{name:<{width}}" + "".join(f"{row[group]:>8.3f}" for group in groups))
    if not report["learned"]:
        lines.append(f"no learned code here; make one with `megatron-bit codes {report['folder']}`")
    return "\n".join(lines)
