"""What a prepared data folder holds: `manifest.json` as frozen dataclasses, written and read here only."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron_bit.config import RemoteConfig
from megatron_bit.data.hf_tokenizer import TOKENIZER_CONFIG
from megatron_bit.data.manifest_schema import read_content, read_head
from megatron_bit.data.remote import RemoteFolder
from megatron_bit.errors import ShardError, UserError
from megatron_bit.io import trust
from megatron_bit.io.exhausted import resource_of

FILE_NAME = "manifest.json"
FORMAT = "megatron_bit.data"
VERSION = 1
SPLITS = ("train", "validation")
LENGTHS_SUFFIX = ".lengths.npy"  # of the sidecar of a shard (data/documents.py); here, for whom numpy is too much
LENGTHS_HEADER = 128  # bytes in front of the 4 for each document


def lengths_file(shard_file: str) -> str:
    """Name of the sidecar: `train-000000.lengths.npy` of `train-000000.tar`."""
    return shard_file.removesuffix(".tar") + LENGTHS_SUFFIX


@dataclass(frozen=True)
class Shard:
    """One tar file of whole documents. `tokens` counts the end-of-document tokens too."""

    file: str  # name inside the data folder
    documents: int
    tokens: int
    text_bytes: int  # UTF-8 bytes of the documents before tokenizing
    size: int  # bytes of the tar file
    sha256: str  # of the tar file
    lengths_sha256: str = ""  # of the sidecar with the documents' lengths; "" in a folder of before


@dataclass(frozen=True)
class Split:
    """The shards of one split in the order they were written."""

    shards: tuple[Shard, ...]

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """A finished data folder. `identity` is what the shards were made from: options and input hash."""

    folder: Path
    splits: Mapping[str, Split]
    tokenizer_file: str
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    dtype: str  # of the token payload: uint16 or uint32, little endian; uint8 [n, ceil(raw_bits / 8)] of records
    identity: Mapping[str, Any]
    package_version: str
    dropped: Mapping[str, int] = field(default_factory=dict)  # documents and records left out, by reason
    raw_bits: int = 0  # bits of a record; 0: tokens of a vocabulary. Records have no tokenizer, vocabulary or end
    code_sha256: str = ""  # of `mbit_data` and its tokenizer libraries' versions; "" in a folder of before
    remote: RemoteFolder | None = field(default=None, compare=False)  # `folder` then mirrors its small files

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides which tokens a run sees; a checkpoint stores it."""
        content = {
            "version": VERSION,
            "dtype": self.dtype,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "tokenizer": self.tokenizer_sha256,
            "splits": {
                name: [[shard.file, shard.tokens, shard.sha256] for shard in split.shards]
                for name, split in self.splits.items()
            },
        }
        if self.raw_bits:
            content["raw_bits"] = self.raw_bits
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def record_shape(self) -> tuple[int, ...]:
        """Of one token in the payload: () for ids, (bytes,) for records."""
        return (-(-self.raw_bits // 8),) if self.raw_bits else ()

    def need_vocabulary(self, what: str) -> None:
        """UserError if the folder holds records; `what` cannot do without a vocabulary."""
        if self.raw_bits:
            raise UserError(
                f"{self.folder} holds records of {self.raw_bits} bits, which have no vocabulary, and {what} needs one"
            )

    @property
    def tokenizer_path(self) -> Path:
        """Where it lies. To open it, take `checked_tokenizer_path`."""
        return self.folder / self.tokenizer_file

    def checked_tokenizer_path(self) -> Path:
        """The tokenizer, once it is known to be the one that the shards were made with; read once for each manifest.

        Raises UserError: records, which have none; a file that is missing or has another SHA-256 than the manifest
        says; beside a tokenizer.json a tokenizer_config.json that lets another token end a document.
        """
        return self._checked_tokenizer

    @functools.cached_property
    def _checked_tokenizer(self) -> Path:
        self.need_vocabulary("a tokenizer")
        path, again = self.tokenizer_path, "copy it back or prepare the data again"
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"tokenizer {path} cannot be read ({error.strerror}); {again}") from error
        if digest != self.tokenizer_sha256:
            raise UserError(
                f"tokenizer {path} is not the one the manifest names (its SHA-256 is {digest}, the manifest says "
                f"{self.tokenizer_sha256}); {again}"
            )
        if path.suffix == ".json":
            from megatron_bit.data.tokenizer import Tokenizer

            beside = path.with_name(TOKENIZER_CONFIG)
            try:
                eos_id = Tokenizer(path).eos_id
            except UserError as error:
                raise UserError(f"{error}: {beside}, which names the end of a document, is another; {again}") from error
            if eos_id != self.eos_id:
                raise UserError(
                    f"{beside} is not the one the data were made with (documents end with token {eos_id}, the manifest "
                    f"says {self.eos_id}); {again}"
                )
        return path

    def split(self, name: str) -> Split:
        """The split of that name. Raises UserError if the folder has none."""
        if name not in self.splits:
            raise UserError(f"{self.folder}: no split {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]

    @property
    def name(self) -> str:
        """Where it lies, for messages."""
        return str(self.folder) if self.remote is None else self.remote.url

    def shard_path(self, shard: Shard) -> Path:
        return self.folder / shard.file

    def shard_name(self, shard: Shard) -> str:
        """Where it lies, for messages."""
        return f"{self.folder}/{shard.file}" if self.remote is None else self.remote.name(shard.file)

    def open_shard(self, shard: Shard) -> IO[bytes]:
        """The tar file, to read. Raises ShardError."""
        if self.remote is not None:
            try:
                return self.remote.open(shard.file, shard.sha256)
            except UserError as error:
                if resource_of(error):  # nothing is wrong with the shard
                    raise
                raise ShardError(f"shard {error}", shard.sha256) from error
        try:
            return open(self.shard_path(shard), "rb")
        except OSError as error:
            if resource_of(error):
                raise
            raise ShardError(
                f"shard {self.shard_name(shard)} cannot be opened ({error.strerror}); copy it back or prepare again",
                shard.sha256,
            ) from error

    def read_lengths(self, shards: Sequence[Shard]) -> list[bytes]:
        """The sidecars of shards. Raises UserError naming the first that cannot be read."""
        if self.remote is not None:
            return self.remote.read_all([(lengths_file(shard.file), shard.lengths_sha256) for shard in shards])
        files = []
        for shard, name in ((shard, lengths_file(shard.file)) for shard in shards):
            try:
                with open(self.folder / name, "rb") as file:
                    files.append(file.read(LENGTHS_HEADER + 4 * shard.documents + 1))  # one more makes another hash
            except OSError as error:
                raise UserError(
                    f"{self.name}/{name} cannot be read ({error.strerror}); copy it back or prepare again"
                ) from error
        return files

    def to_json(self) -> str:
        """The text of `manifest.json`; the totals in it are for people, the loader adds them up itself."""
        splits = {
            name: {
                "documents": split.documents,
                "tokens": split.tokens,
                "text_bytes": split.text_bytes,
                "shards": [asdict(shard) for shard in split.shards],
            }
            for name, split in self.splits.items()
        }
        content = {
            "format": FORMAT,
            "version": VERSION,
            "package_version": self.package_version,
            "code_sha256": self.code_sha256,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "dtype": self.dtype,
            **({"raw_bits": self.raw_bits} if self.raw_bits else {}),
            "tokenizer": {"file": self.tokenizer_file, "sha256": self.tokenizer_sha256},
            "identity": dict(self.identity),
            "dropped": dict(self.dropped),
            "splits": splits,
        }
        return json.dumps(content, indent=2) + "\n"


def load_manifest(folder: Path | str, check_files: bool = True, options: RemoteConfig | None = None) -> Manifest:
    """Read `folder/manifest.json`; with `check_files`, also that every shard is there at its full size.

    A folder may be remote (data/remote.py), with `options`: then its shards are looked at when they are fetched.
    Raises UserError: no such folder or manifest, broken or edited JSON, a format version this package does
    not know, a shard that is missing or of another size (its hash is for `mbit_data.verify`), or another tokenizer.
    """
    if trust.acts(str(folder)):
        return _load_remote(RemoteFolder(str(folder), options or RemoteConfig()))
    folder = Path(folder)
    path = folder / FILE_NAME
    if not folder.is_dir():
        raise UserError(
            f"data folder {folder} does not exist; if it has moved, say where (data.path=DIR or --data DIR), else make "
            "it with `megatron-bit prepare`"
        )
    if not path.is_file():
        raise UserError(f"{folder} has no {FILE_NAME}: `megatron-bit prepare` did not make it or did not finish")
    manifest = _parse(folder, path, str(path))
    if check_files:
        check_sizes(manifest)
    return manifest


def _load_remote(remote: RemoteFolder) -> Manifest:
    try:
        path = remote.copy(FILE_NAME)
    except FileNotFoundError as error:
        raise UserError(f"{remote.name(FILE_NAME)} does not exist: no data folder of `megatron-bit prepare`") from error
    manifest = dataclasses.replace(_parse(remote.mirror, path, remote.name(FILE_NAME)), remote=remote)
    if manifest.raw_bits:
        return manifest
    remote.place(manifest.tokenizer_file, remote.read(manifest.tokenizer_file, manifest.tokenizer_sha256))
    if manifest.tokenizer_file.endswith(".json"):
        try:
            remote.copy(TOKENIZER_CONFIG)
        except FileNotFoundError:  # then one of before does not count either
            (remote.mirror / TOKENIZER_CONFIG).unlink(missing_ok=True)
    return manifest


def _parse(folder: Path, path: Path, where: str) -> Manifest:
    head = read_head(path, where)
    if head.get("format") != FORMAT:
        raise UserError(f"{where} is not a {FORMAT} manifest; name a folder made by `megatron-bit prepare`")
    if head.get("version") != VERSION:
        raise UserError(f"{where} has format version {head.get('version')!r}, known is {VERSION}; prepare again")
    content = read_content(path, where)
    manifest = Manifest(
        folder=folder,
        splits={
            name: Split(tuple(Shard(**shard) for shard in split["shards"])) for name, split in content["splits"].items()
        },
        tokenizer_file=content["tokenizer"]["file"],
        tokenizer_sha256=content["tokenizer"]["sha256"],
        vocab_size=content["vocab_size"],
        eos_id=content["eos_id"],
        dtype=content["dtype"],
        identity=content["identity"],
        package_version=content["package_version"],
        dropped=content.get("dropped", {}),
        raw_bits=content.get("raw_bits", 0),
        code_sha256=content.get("code_sha256", ""),
    )
    stored, computed = content["fingerprint"], manifest.fingerprint
    if stored != computed:
        raise UserError(
            f"{where} was edited: it states fingerprint {stored}, its content gives {computed}; prepare again"
        )
    return manifest


def check_sizes(manifest: Manifest) -> None:
    """Raises UserError naming the first shard that is missing or of another size, or a tokenizer of another SHA-256."""
    if not manifest.raw_bits:
        manifest.checked_tokenizer_path()
    for split in manifest.splits.values():
        for shard in split.shards:
            path = manifest.shard_path(shard)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise UserError(
                    f"shard {path} cannot be opened ({error.strerror}); copy it back or prepare again"
                ) from error
            if size != shard.size:
                raise UserError(f"shard {path} has {size} bytes, not {shard.size} as the manifest says; copy it again")
