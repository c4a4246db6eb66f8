"""The commands around a data folder. Each imports what it needs when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_bit.commands.arguments import Args
from megatron_bit.errors import EXIT_USER_ERROR, UserError
from megatron_bit.io.paths import user_path


def prepare(
    inputs: Annotated[Args, tyro.conf.arg(metavar="INPUT ...")] = (),
    *,
    out: Path,
    vocab_size: int | None = None,
    tokenizer: Path | None = None,
    eos_token: str | None = None,
    model_type: Literal["bpe", "unigram"] | None = None,
    validation_fraction: float = 0.02,
    shard_tokens: int = 2_000_000,
    tokenizer_sample_bytes: int | None = None,
    text_key: str | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    dedup: Literal["exact", "near"] | None = None,
    min_chars: int | None = None,
    max_chars: int | None = None,
    min_alpha_fraction: float | None = None,
    max_symbol_ratio: float | None = None,
    max_duplicate_lines: float | None = None,
    max_repeated_ngrams: float | None = None,
    workers: int | None = None,
    array: bool = False,
    array_index: int | None = None,
    array_count: int | None = None,
    join: bool = False,
    codes: Literal["semantic"] | None = None,
    raw_bits: int | None = None,
    document_records: int | None = None,
    quiet: bool = False,
) -> int:
    """Turn text into shards: train a tokenizer (or take one), tokenize, write webdataset tars and a manifest.

    Or binary records, with --raw-bits: each is a token, and there is no vocabulary.

    Interrupted, the same command goes on behind the last finished shard.

    Args:
        inputs: text, JSON, .parquet, also .gz, .xz, .zst; pipes, folders, globs; `stdlib`: Python's standard library.
        out: folder to write.
        vocab_size: of the tokenizer to train; default 4096.
        tokenizer: an existing SentencePiece .model or Hugging Face tokenizer.json, instead of training one.
        eos_token: token that ends a document, where a tokenizer.json does not tell.
        model_type: of the tokenizer to train; default bpe.
        validation_fraction: share of the documents held out, chosen by their hash.
        shard_tokens: tokens of one shard.
        tokenizer_sample_bytes: text to train the tokenizer on; default 8,000,000.
        text_key: key of the text in JSON, and column in Parquet; default text.
        on_error: at a damaged record, or what may not be read in a folder: stop, or leave it out and count it.
        dedup: leave out copies: of the same text but for white space, or of nearly the same words.
        min_chars: leave out shorter documents.
        max_chars: leave out longer documents.
        min_alpha_fraction: least share of words with a letter in them; 0.8 is usual.
        max_symbol_ratio: most "#" and "..." for each word; 0.1 is usual.
        max_duplicate_lines: greatest share of lines that repeat another one; 0.3 is usual.
        max_repeated_ngrams: greatest share of text in repeated 5-grams of words; 0.15 is usual.
        workers: processes; default all CPUs of the job.
        array: do the share of this task of a SLURM job array.
        array_index: do share number I, from 0 ...
        array_count: ... of N.
        join: make the manifest when all shares are done; only --out is needed.
        codes: learn a code as well, for model.code=semantic, as `megatron-bit codes DIR` does.
        raw_bits: files are sequences of records of so many bits (1 to 256), each in whole bytes, for model.code=raw.
        document_records: with --raw-bits: a longer file is cut into documents of so many records; default 65,536.
        quiet: no progress.
    """
    from mbit_data.filters import Filters
    from mbit_data.options import Part, PrepareOptions

    out, tokenizer = user_path(out), None if tokenizer is None else user_path(tokenizer)
    if raw_bits is not None:
        text = {
            "vocab_size": vocab_size, "tokenizer": tokenizer, "eos_token": eos_token, "model_type": model_type,
            "tokenizer_sample_bytes": tokenizer_sample_bytes, "dedup": dedup, "min_chars": min_chars,
            "max_chars": max_chars, "min_alpha_fraction": min_alpha_fraction, "max_symbol_ratio": max_symbol_ratio,
            "max_duplicate_lines": max_duplicate_lines, "max_repeated_ngrams": max_repeated_ngrams, "codes": codes,
            "workers": workers, "array": array or None, "array_index": array_index, "array_count": array_count,
            "join": join or None, "text_key": text_key,
        }  # fmt: skip
        for name, value in text.items():
            if value is not None:
                raise UserError(f"--{name.replace('_', '-')} is for text, and --raw-bits makes records; leave it out")
        from mbit_data.raw import DEFAULT_DOCUMENT_RECORDS, RawOptions, prepare_raw

        how = RawOptions(
            tuple(inputs), out, raw_bits, DEFAULT_DOCUMENT_RECORDS if document_records is None else document_records,
            validation_fraction, shard_tokens, on_error,
        )  # fmt: skip
        return _prepared(prepare_raw(how, progress=not quiet), None, quiet)
    if document_records is not None:
        raise UserError("--document-records is for --raw-bits")
    if (array_index is None) != (array_count is None) or (array and array_index is not None):
        raise UserError("a share is --array-index I with --array-count N, or --array in a SLURM job array")
    if join:
        if inputs or array or array_index is not None:
            raise UserError("--join takes the parts in --out as they are: leave out inputs and --array options")
        from mbit_data.array import join as run_join

        return _prepared(run_join(out, progress=not quiet), codes, quiet)
    part = Part(array_index, array_count) if array_index is not None and array_count is not None else None
    if array:
        from mbit_data.array import part_from_environment

        part = part_from_environment()
    if part is not None and codes is not None:
        raise UserError("--codes is for the whole folder: give it with --join")
    extra = {} if workers is None else {"workers": workers}
    options = PrepareOptions(
        inputs=tuple(inputs),
        out=out,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        model_type=model_type,
        tokenizer_sample_bytes=tokenizer_sample_bytes,
        validation_fraction=validation_fraction,
        shard_tokens=shard_tokens,
        eos_token=eos_token,
        text_key=text_key,
        on_error=on_error,
        dedup=dedup,
        filters=Filters(
            min_chars=min_chars,
            max_chars=max_chars,
            min_alpha_fraction=min_alpha_fraction,
            max_symbol_ratio=max_symbol_ratio,
            max_duplicate_lines=max_duplicate_lines,
            max_repeated_ngrams=max_repeated_ngrams,
        ),
        part=part,
        **extra,
    )
    if part is None:
        from mbit_data.prepare import prepare as run

        return _prepared(run(options, progress=not quiet), codes, quiet)
    from mbit_data.array import prepare_part

    print(f"{out}: {prepare_part(options, progress=not quiet).describe(out)}")
    return 0


def _prepared(manifest, codes: str | None, quiet: bool) -> int:
    from mbit_data.work import describe_dropped

    train_split, held = manifest.split("train"), manifest.split("validation")
    left_out = f"; left out: {describe_dropped(manifest.dropped)}" if manifest.dropped else ""
    kind = f"records of {manifest.raw_bits} bits" if manifest.raw_bits else f"vocabulary {manifest.vocab_size:,}"
    print(
        f"{manifest.folder}: {train_split.tokens:,} training and {held.tokens:,} validation tokens in "
        f"{len(train_split.shards) + len(held.shards)} shards, {kind}{left_out}"
    )
    if codes is not None:  # after the manifest: killed here, the same command finds the shards done and learns the code
        from mbit_data.codes import CodeOptions, learn

        from megatron_bit.commands.codes import learned_line

        print(learned_line(learn(manifest.folder, CodeOptions(), progress=not quiet)))
    return 0


def verify(folder: Annotated[Path, tyro.conf.Positional]) -> int:
    """Hash every shard of a data folder again; name the damaged ones. Exit code 2 if there are any."""
    from mbit_data.verify import verify as run

    folder = user_path(folder)
    problems = run(folder)
    for problem in problems:
        print(problem)
    print(f"{folder}: {f'{len(problems)} problems' if problems else 'complete and undamaged'}")
    return EXIT_USER_ERROR if problems else 0


def inspect(
    folder: Annotated[Path, tyro.conf.Positional],
    split: Literal["train", "validation"] = "train",
    samples: int = 3,
    seed: int = 0,
    chars: int = 300,
    tokens: int = 8,
    bits: int | None = None,
    code: Literal["binary", "gray", "random", "semantic"] | None = None,
    json: bool = False,
) -> int:
    """Show what a data folder holds: counts, options, document lengths, samples with the bits of their first tokens.

    Args:
        folder: data folder.
        split: where to look for samples and lengths.
        samples: documents to show.
        seed: another one shows other documents.
        chars: of each sample.
        tokens: of each sample to show with their ids.
        bits: show the bits of these tokens, so many of them, as model.bits; with --code alone the fewest possible.
        code: show them under this code, as model.code; with --bits alone binary.
        json: print JSON.
    """
    from mbit_data import inspection as job

    for option, value in (("--samples", samples), ("--chars", chars), ("--tokens", tokens)):
        if value < 0:
            raise UserError(f"{option} {value} has to be at least 0")
    report = job.inspect(user_path(folder), split, samples, seed, chars, tokens, bits, code)
    if json:
        from json import dumps

        print(dumps(report, indent=1))
    else:
        print(job.render(report))
    return 0


def bench_data(
    inputs: Annotated[Args, tyro.conf.arg(metavar="INPUT ...")] = ("stdlib",),
    megabytes: int = 20,
    tokenizer: Path | None = None,
    workers: tuple[int, ...] = (1, 2),
    repeats: int = 5,
    json: bool = False,
) -> int:
    """Time `prepare` against the tokenizer alone, and the stream of batches against webdataset and a memory map.

    Also start-up, resume and memory of the stream with 10 and with 10,000 shards.

    Args:
        inputs: as of prepare.
        megabytes: of text to take from them.
        tokenizer: .model or tokenizer.json; default a new one of 4096 pieces.
        workers: numbers of processes of prepare.
        repeats: of each, in turn.
        json: print JSON.
    """
    for option, value in (("--megabytes", megabytes), ("--workers", min(workers)), ("--repeats", repeats)):
        if value < 1:
            raise UserError(f"{option} {value} has to be at least 1")
    from megatron_bit.bench import data as job

    return job.main(
        tuple(inputs), megabytes, None if tokenizer is None else user_path(tokenizer), workers, repeats, json
    )
