"""One prepare as an array of tasks (SLURM or any other): each makes the shards of its share, `join` the manifest.

Task I of N takes a run of consecutive files, about 1/N of the bytes on disk. Shards end with their task, so they are
cut elsewhere than a single process would; joined in the order of the tasks they hold the same documents in the same
order and splits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from mbit_data import dedup
from mbit_data.decompress import ChangedInput
from mbit_data.filters import add_counts
from mbit_data.input_file import InputFile
from mbit_data.inputs import expand_inputs
from mbit_data.journal import Journal
from mbit_data.left_out import LeftOut
from mbit_data.lock import only_one
from mbit_data.options import Part, PrepareOptions, code_sha256, differences
from mbit_data.prepare import disk_errors, write_manifest
from mbit_data.progress import Reporter
from mbit_data.read import combine_hashes, scan, text_files
from mbit_data.work import Work, describe_dropped, make_tokenizer, write_keys, write_shards
from megatron_bit.data.hf_tokenizer import TOKENIZER_CONFIG
from megatron_bit.data.manifest import FILE_NAME, SPLITS, Manifest, Shard, Split, check_sizes, load_manifest
from megatron_bit.data.manifest_schema import LIMIT, ShardEntry, TokenizerEntry
from megatron_bit.data.tokenizer import FILE_NAMES, Tokenizer
from megatron_bit.errors import UserError
from megatron_bit.io.files import PARTIAL, write_atomic
from megatron_bit.io.strict_json import Count, fits, tree

ARRAY_FILE = "array.json"  # what all tasks of the folder have in common


@with_config(ConfigDict(extra="allow"))
class Common(TypedDict):
    """`PrepareOptions.identity` of an array: what is used of it here."""

    format_version: Any
    parts: Annotated[int, Field(ge=1, lt=2**20)]
    tokenizer: dict[str, Any]


class ArrayContent(TypedDict):
    """array.json."""

    identity: Common
    code_sha256: str


class PartContent(TypedDict):
    """What a task has made. Sources may hold bytes that are no UTF-8."""

    identity: dict[str, Any]
    files: list[Annotated[list[Any], Field(min_length=2, max_length=2)]]
    tokenizer: TokenizerEntry
    splits: dict[Literal["train", "validation"], list[ShardEntry]]
    dropped: dict[str, Count]


ARRAY: TypeAdapter[ArrayContent] = TypeAdapter(ArrayContent)
PART: TypeAdapter[PartContent] = TypeAdapter(PartContent)


@dataclass(frozen=True)
class PartResult:
    """What a task has done. `splits` is None if it waits for the keys of the tasks `waiting`."""

    part: Part
    splits: Mapping[str, Split] | None
    waiting: tuple[int, ...] = ()

    def describe(self, out: Path) -> str:
        """One line for the user: what was made, and what to do next."""
        if self.splits is None:
            return (
                f"{self.part}: keys for duplicates written, waiting for those of {_numbers(list(self.waiting))}; "
                "when all parts have run once, run all of them again"
            )
        counts = ", ".join(f"{split.tokens:,} {name} tokens" for name, split in self.splits.items())
        return f"{self.part}: {counts}; when all parts are done: megatron-bit prepare --join --out {out}"


def prepare_part(options: PrepareOptions, progress: bool = True) -> PartResult:
    """Do the share of `options.part`, go on with it, or find it done.

    With `dedup` a share takes two runs: the first one writes the keys of its documents; the second one, once all
    tasks have done so, the shards. Raises UserError as `mbit_data.prepare.prepare` does, and if the folder is of an
    array of other inputs, options, code or count.
    """
    options.check()
    part = options.part
    if part is None:
        raise ValueError("prepare_part needs options.part")
    report, out = Reporter(progress), Path(options.out)
    listed, left_out = LeftOut(options.on_error), LeftOut(options.on_error)
    everything = expand_inputs(options.inputs, out, listed, spool=out)
    options.check_use(everything)
    common = options.identity({"listing_sha256": _listing_hash(everything)})
    share = share_of(everything, part)
    files = scan(share, options.workers, options.reading(), left_out)
    for line in listed.lines() + left_out.lines():
        report.line(line)
    digests = [(file.source, file.sha256) for file in files]
    about = {**common, "part": part.index, "content": combine_hashes(digests)}
    with disk_errors(out):
        _join_array(out, common, part)
    with disk_errors(out), only_one(out / f"{part.name}.lock", report):
        if _part_path(out, part).exists():
            return _finished(out, part, about, report)
        if (out / FILE_NAME).exists():
            raise UserError(f"{out} is finished, but without {part}; choose another folder")
        journal = Journal(out / f"{part.name}.unfinished.jsonl", about, code_sha256(), part.prefix)
        for note in journal.notes:
            report.line(note)
        work = Work(options, out, files, journal, report)
        report.line(f"{part}: {len(files)} of {len(everything)} files, {work.total_bytes / 1e6:.1f} MB")
        copies, waiting = _copies(work, part)
        if waiting:
            return PartResult(part, None, waiting)
        trained = (out / FILE_NAMES["sentencepiece"]).exists()
        to_train_on = (
            [] if options.tokenizer or trained else text_files(everything, options.workers, LeftOut(options.on_error))
        )
        tokenizer = make_tokenizer(work, to_train_on, may_reuse=True)
        journal.use_tokenizer(tokenizer.sha256)
        try:
            splits, dropped = write_shards(work, tokenizer, copies)
        except ChangedInput:
            journal.forget()
            raise
        dropped |= left_out.counts | (listed.counts if part.index == 0 else {})  # all tasks have listed the same
        content = {
            "identity": about,
            "files": digests,
            "tokenizer": {"file": tokenizer.path.name, "sha256": tokenizer.sha256},
            "splits": {name: [asdict(shard) for shard in split.shards] for name, split in splits.items()},
            "dropped": dropped,
        }
        journal.check()
        write_atomic(_part_path(out, part), (json.dumps(content, indent=1) + "\n").encode())
        journal.path.unlink()
    if dropped:
        report.line(f"left out: {describe_dropped(dropped)}")
    return PartResult(part, splits)


def join(out: Path, progress: bool = True) -> Manifest:
    """The manifest of a folder whose parts are all finished; run again, the same one.

    Raises UserError naming the parts that are not finished, or a shard that is missing.
    """
    out, report = Path(out), Reporter(progress)
    if not (out / ARRAY_FILE).exists():
        raise UserError(
            f"{out} holds no parts to join: no {ARRAY_FILE}; run prepare --array-index I --array-count N first"
        )
    if (out / FILE_NAME).exists():
        report.line(f"{out}: nothing to do, already joined")
        return load_manifest(out)
    common = _read(out / ARRAY_FILE, ARRAY)["identity"]
    count = common["parts"]
    parts = [Part(index, count) for index in range(count)]
    missing = [part.index for part in parts if not _part_path(out, part).exists()]
    if missing:
        raise UserError(f"{out}: {_numbers(missing)} of {count} parts not finished; run them (again), then join")
    contents = [_read(_part_path(out, part), PART) for part in parts]
    tokenizers = {(content["tokenizer"]["file"], content["tokenizer"]["sha256"]) for content in contents}
    if len(tokenizers) > 1:
        raise UserError(f"{out}: the parts were made with {len(tokenizers)} different tokenizers; prepare them again")
    ((name, sha256),) = tokenizers
    tokenizer = Tokenizer(out / name)
    if tokenizer.sha256 != sha256:
        raise UserError(f"{tokenizer.path} is another tokenizer than the parts were made with; copy it back")
    eos_id = common["tokenizer"].get("eos_id", tokenizer.eos_id)
    if tokenizer.eos_id != eos_id:
        raise UserError(
            f"{tokenizer.path.with_name(TOKENIZER_CONFIG)} is not the one the parts were made with (documents end with "
            f"token {tokenizer.eos_id}, with {eos_id} in the parts); copy it back"
        )
    dropped: Counter[str] = Counter()
    for content in contents:
        add_counts(dropped, content["dropped"])
    splits = {
        split: Split(tuple(Shard(**shard) for content in contents for shard in content["splits"].get(split, [])))
        for split in SPLITS
    }
    if not any(split.documents for split in splits.values()):
        raise UserError(f"{out}: the input is empty: no part has a document")
    content_hash = combine_hashes((source, digest) for content in contents for source, digest in content["files"])
    rest = {name: value for name, value in common.items() if name != "listing_sha256"}
    identity = {"format_version": rest.pop("format_version"), "input_sha256": content_hash, **rest}
    check_sizes(Manifest(out, splits, name, sha256, tokenizer.vocab_size, tokenizer.eos_id, "", identity, ""))
    with disk_errors(out):
        manifest = write_manifest(out, splits, tokenizer, identity, dict(sorted(dropped.items())))
        for part in parts:
            _keys_path(out, part).unlink(missing_ok=True)
    if dropped:
        report.line(f"left out: {describe_dropped(manifest.dropped)}")
    report.line(f"wrote {out / FILE_NAME} from {count} parts")
    return manifest


def part_from_environment() -> Part:
    """The task SLURM says this is. Raises UserError outside of a job array."""
    from megatron_bit.io.environment import environment_int

    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
    if any(name not in os.environ for name in names):
        raise UserError(
            f"--array takes its share from {names[0]} and {names[1]}, which are not set; start it with sbatch --array, "
            "or give --array-index and --array-count"
        )
    number, count = (environment_int(name, 0) for name in names)
    first, step = environment_int("SLURM_ARRAY_TASK_MIN", 0), environment_int("SLURM_ARRAY_TASK_STEP", 1)
    return Part((number - first) // max(1, step), count)


def share_of(files: list[InputFile], part: Part) -> list[InputFile]:
    """The files in whose middle byte the part lies, of all bytes on disk: consecutive, none twice, none left out."""
    total = sum(file.size for file in files) or 1
    share, before = [], 0
    for file in files:
        if min(part.count - 1, (2 * before + file.size) * part.count // (2 * total)) == part.index:
            share.append(file)
        before += file.size
    return share


def _join_array(out: Path, common: dict[str, Any], part: Part) -> None:
    """Found the folder, or find it founded for the same inputs, options, code and count."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / ARRAY_FILE
    header = {"identity": common, "code_sha256": code_sha256()}
    if not path.exists():
        foreign = [entry.name for entry in out.iterdir() if not _is_scrap(entry.name)]
        if foreign and not path.exists():  # another task may have come first
            raise UserError(f"{out} is not empty and not the folder of an array; choose another folder")
        own = out / f"{part.prefix}{ARRAY_FILE}"
        write_atomic(own, (json.dumps(header, indent=1) + "\n").encode())
        with suppress(FileExistsError):
            os.link(own, path)  # unlike a rename it does not replace what another task has written
        own.unlink()
    there = _read(path, ARRAY)
    different = differences(there["identity"], common)
    if different:
        raise UserError(
            f"{out} holds an array of other data: {different}; give the same inputs and options (a part that is run "
            "again on its own needs --array-index and --array-count), choose another folder, or remove it"
        )
    if there["code_sha256"] != header["code_sha256"]:
        raise UserError(
            f"{out} holds an array begun by other code; finish it with that, choose another folder, or remove it"
        )


def _is_scrap(name: str) -> bool:
    """Of other tasks at work, and (.nfs) what they keep of pipes."""
    return name.endswith((f"-{ARRAY_FILE}", PARTIAL)) or name.startswith(".nfs")


def _finished(out: Path, part: Part, about: dict[str, Any], report: Reporter) -> PartResult:
    content = _read(_part_path(out, part), PART)
    different = differences(content["identity"], about)
    if different:
        raise UserError(f"{out} holds {part} of other data: {different}; choose another folder or remove it")
    report.line(f"{out}: nothing to do, {part} is finished")
    return PartResult(part, {s: Split(tuple(Shard(**x) for x in content["splits"].get(s, []))) for s in SPLITS})


def _copies(work: Work, part: Part) -> tuple[np.ndarray | None, tuple[int, ...]]:
    """(documents of this part to leave out, parts that have not written their keys yet)."""
    if work.options.dedup is None:
        return None, ()
    write_keys(work)
    parts = [Part(index, part.count) for index in range(part.count)]
    paths = [_keys_path(work.out, other) for other in parts]
    waiting = tuple(other.index for other, path in zip(parts, paths, strict=True) if not path.exists())
    if waiting:
        return None, waiting
    copies = dedup.choose(paths, work.options.dedup, lambda text: work.report.line(f"duplicates: {text}"))
    record = 8 * dedup.record_words(work.options.dedup)
    counts = [path.stat().st_size // record for path in paths]
    begin = sum(counts[: part.index])
    return copies[begin : begin + counts[part.index]], ()


def _keys_path(out: Path, part: Part) -> Path:
    return out / f"{part.name}.keys"


def _part_path(out: Path, part: Part) -> Path:
    return out / f"{part.name}.json"


def _listing_hash(files: list[InputFile]) -> str:
    """Over names and sizes: every task can have it without reading the others' files."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{len(file.source)}:{file.source}:{file.size}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def _numbers(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:10])) + (", ..." if len(indices) > 10 else "")
    return f"{'part' if len(indices) == 1 else 'parts'} {shown}"


def _read(path: Path, schema: TypeAdapter[Any]) -> Any:
    again = "remove the folder and prepare again"
    try:
        if path.stat().st_size > LIMIT:
            raise ValueError(f"more than {LIMIT:,} bytes")
        content = tree(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); {again}") from error
    return fits(content, schema, str(path), again)
