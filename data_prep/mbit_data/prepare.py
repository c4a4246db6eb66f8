"""Text files into a finished data folder: inputs -> tokenizer -> token arrays -> shards -> manifest."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mbit_data import dedup
from mbit_data.decompress import ChangedInput
from mbit_data.inputs import expand_inputs
from mbit_data.journal import Journal
from mbit_data.left_out import LeftOut
from mbit_data.lock import only_one
from mbit_data.options import PrepareOptions, code_sha256, differences
from mbit_data.progress import Reporter
from mbit_data.read import combine_hashes, scan
from mbit_data.work import (
    KEYS_FILE,
    Work,
    describe_dropped,
    dtype_of,
    keys_path,
    make_tokenizer,
    write_keys,
    write_shards,
)
from megatron_bit import __version__
from megatron_bit.data.hf_tokenizer import TOKENIZER_CONFIG
from megatron_bit.data.manifest import FILE_NAME, Manifest, Split, load_manifest
from megatron_bit.data.tokenizer import FILE_NAMES, Tokenizer
from megatron_bit.errors import UserError
from megatron_bit.io.files import PARTIAL, write_atomic

UNFINISHED_FILE = "unfinished.jsonl"  # marks a folder as ours until its manifest is written

__all__ = ["PrepareOptions", "prepare"]


def prepare(options: PrepareOptions, progress: bool = True) -> Manifest:
    """Make the data folder `options.out`, go on with it, or find it finished from the same options and inputs.

    The bytes written depend on the inputs and options alone, not on `workers`. Raises UserError for what
    the user can fix: options, inputs, a folder in use, a full disk.
    """
    options.check()
    if options.part is not None:
        raise ValueError("a part is made by mbit_data.array.prepare_part")
    report, out = Reporter(progress), Path(options.out)
    left_out = LeftOut(options.on_error)
    found = expand_inputs(options.inputs, out, left_out, spool=out)
    options.check_use(found)
    files = scan(found, options.workers, options.reading(), left_out)
    for line in left_out.lines():
        report.line(line)
    if not files:
        raise UserError(f"none of the {len(found)} input files is text (first: {found[0].name})")
    content = combine_hashes((file.source, file.sha256) for file in files)
    identity = options.identity({"input_sha256": content})

    def make(journal: Journal) -> Manifest:
        work = Work(options, out, files, journal, report)
        report.line(f"{len(files)} files, {work.total_bytes / 1e6:.1f} MB")
        tokenizer = make_tokenizer(work, files, may_reuse=journal.continued)
        journal.use_tokenizer(tokenizer.sha256)
        splits, dropped = write_shards(work, tokenizer, _copies(work))
        if not any(split.documents for split in splits.values()):
            why = f"all were left out ({describe_dropped(dropped)})" if dropped else "there are none"
            raise UserError(
                f"the input is empty: {len(files)} files (first: {files[0].name}), and of their documents {why}"
            )
        dropped |= left_out.counts
        journal.check()
        manifest = write_manifest(out, splits, tokenizer, identity, dropped)
        (out / KEYS_FILE).unlink(missing_ok=True)
        if dropped:
            report.line(f"left out: {describe_dropped(dropped)}")
        return manifest

    return make_folder(out, identity, report, make)


def make_folder(
    out: Path, identity: Mapping[str, Any], report: Reporter, make: Callable[[Journal], Manifest]
) -> Manifest:
    """Find the folder finished, or let `make` write its shards and at last its manifest, under the folder's lock."""
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with disk_errors(out), only_one(out, report):
        if (out / FILE_NAME).exists():
            return _finished(out, identity, report)
        journal = claim(out, out / UNFINISHED_FILE, identity, report)
        try:
            manifest = make(journal)
        except ChangedInput:
            journal.forget()
            raise
        journal.path.unlink()
    report.line(f"wrote {out / FILE_NAME}")
    return manifest


def _finished(out: Path, identity: Mapping[str, Any], report: Reporter) -> Manifest:
    """The manifest that is there. Raises UserError if it is of other data."""
    manifest = load_manifest(out)
    different = differences(manifest.identity, identity)
    if different:
        raise UserError(f"{out} holds other data: {different}; choose another folder or remove it")
    for left in (out / UNFINISHED_FILE, out / KEYS_FILE):  # by a process killed in its last moment
        left.unlink(missing_ok=True)
    report.line(f"{out}: nothing to do, already prepared from the same inputs and options")
    return manifest


def claim(out: Path, journal: Path, identity: Mapping[str, Any], report: Reporter) -> Journal:
    """Make the folder ours: an empty or new one, or one that an interrupted `prepare` left behind."""
    if not journal.exists() and any(not _is_scrap(path) for path in out.iterdir()):
        raise UserError(f"{out} is not empty and not a data folder; choose another folder")
    result = Journal(journal, identity, code_sha256())
    if not result.continued:  # what other code or options have left
        for name in (*FILE_NAMES.values(), TOKENIZER_CONFIG, KEYS_FILE):
            (out / name).unlink(missing_ok=True)
    for note in result.notes:
        report.line(note)
    for path in out.iterdir():
        if path.suffix == PARTIAL and _is_scrap(path):
            path.unlink()
    return result


def _is_scrap(path: Path) -> bool:
    """What is left of a file of ours when the process is killed while it is written."""
    ours = (*FILE_NAMES.values(), TOKENIZER_CONFIG, FILE_NAME, UNFINISHED_FILE, KEYS_FILE)
    # what a pipe gave is kept in a nameless file, which NFS gives a name until it is closed
    return path.name in {f"{name}{PARTIAL}" for name in ours} or path.name.startswith(".nfs")


def write_manifest(
    out: Path, splits: dict[str, Split], tokenizer: Tokenizer, identity: dict[str, Any], dropped: dict[str, int]
) -> Manifest:
    """The last step: from here on the folder is finished. Raises OSError."""
    manifest = Manifest(
        folder=out,
        splits=splits,
        tokenizer_file=tokenizer.path.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        dtype=dtype_of(tokenizer),
        identity=identity,
        package_version=__version__,
        dropped=dropped,
        code_sha256=code_sha256(),
    )
    write_atomic(out / FILE_NAME, manifest.to_json().encode())
    return manifest


def _copies(work: Work) -> np.ndarray | None:
    if work.options.dedup is None:
        return None
    write_keys(work)
    return dedup.choose([keys_path(work)], work.options.dedup, lambda text: work.report.line(f"duplicates: {text}"))


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """An OSError of writing as a UserError; inputs that cannot be read are UserErrors already."""
    try:
        yield
    except OSError as error:
        hint = "free disk space" if error.errno == errno.ENOSPC else "make it writable"
        raise UserError(f"cannot write to {out}: {error.strerror or error}; {hint} or choose another folder") from error
