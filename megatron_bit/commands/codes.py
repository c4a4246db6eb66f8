"""`megatron-bit codes`: learn which bits a token gets, or say what codes cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from megatron_bit.commands.arguments import Args
from megatron_bit.errors import UserError
from megatron_bit.io.paths import user_path


def codes(
    folder: Annotated[Path, tyro.conf.Positional],
    files: Annotated[Args, tyro.conf.arg(metavar="FILE ...")] = (),
    *,
    bits: int | None = None,
    tokens: int = 20_000_000,
    sweeps: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    compare: bool = False,
    force: bool = False,
    quiet: bool = False,
    json: bool = False,
) -> int:
    """Learn a code from a data folder's text, for training with `model.code=semantic`: tokens that follow the same
    tokens get bits in common, so that deciding the bits apart loses less. No network is trained; it takes about a
    minute on one core for a vocabulary of 4,096, two for 32,000.

    It is written to DATA/codes/semantic-BITS.safetensors, where `train` looks for it. The same data and options give
    the same file; run again, there is nothing to do. Another code at the same place is kept unless --force is given,
    because runs that use it could not go on with a new one.

    With --compare nothing is written: how many nats a token binary, gray, random and the learned code cost on held-out
    text, by a bigram, when groups of 1, 4, 5, 8 bits (`model.group_bits`) are decided apart. Lower is better.

    Args:
        folder: a data folder that `megatron-bit prepare` has made.
        files: with --compare, more learned codes to measure.
        bits: of a token, as model.bits; default the fewest that hold the vocabulary.
        tokens: of training text to count, from shards spread evenly.
        sweeps: of the search; more is slower and better. Default 1000 for small vocabularies, down to 300.
        seed: another one finds another code, about as good.
        out: another file to write.
        compare: measure codes instead.
        force: replace a different code that is there.
        quiet: no progress.
        json: print JSON.
    """
    from mbit_data import codes as job

    if files and not compare:
        raise UserError(f"files ({files[0]}) are for --compare; the file to write is --out FILE")
    if compare and (out is not None or force):
        raise UserError("--compare writes nothing: leave out --out and --force")
    folder, out = user_path(folder), None if out is None else user_path(out)
    options = job.CodeOptions(bits=bits, tokens=tokens, sweeps=sweeps, seed=seed)
    if compare:
        report = job.compare(folder, options, tuple(map(user_path, files)), progress=not quiet)
        text = job.render(report)
    else:
        report = job.learn(folder, options, out, force, progress=not quiet)
        text = learned_line(report)
    if json:
        from json import dumps

        text = dumps(report, indent=1)
    print(text)
    return 0


def learned_line(report: dict) -> str:
    """What `mbit_data.codes.learn` did."""
    use = f"train with model.code=semantic model.bits={report['bits']}"
    if not report["made"]:
        return f"{report['path']}: nothing to do, already learned from the same data and options; {use}"
    return (
        f"{report['path']}: {report['bits']} bits for {report['vocab_size']:,} tokens in {report['seconds']} s; {use}"
    )
