"""`data`: which text, in which order, and from where."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_bit.config.section import Section
from megatron_bit.errors import UserError

Verify = Literal["first", "always", "never"]


class RemoteConfig(Section):
    cache: str = ""
    """Folder on the node's own disk for shards that were fetched; its processes share it. Without a name
    ~/.cache/megatron_bit."""
    cache_gib: float = Field(default=50.0, gt=0)
    """Size of the cache; what was not used for longest goes first."""
    attempts: int = Field(default=6, ge=1)
    """How often a file is asked for before the run ends, with growing pauses."""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """An attempt is given up when nothing has come for this long."""
    workers: int = Field(default=4, ge=1, le=1024)
    """Shards fetched at a time, ahead of need: those of this window and the next."""


class SourceConfig(Section):
    path: str = Field(min_length=1)
    """As `data.path`."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the samples, relative to the other sources'."""
    epochs: float | None = Field(default=None, gt=0)
    """Share of the samples: this many times all that the source has."""


class DataConfig(Section):
    path: str = ""
    """Folder written by `megatron-bit prepare` (it holds manifest.json), or where there is one: a URL that fsspec reads
    (https://, s3://, gs://), or `pipe:COMMAND {file}`, a command that writes a file of it to its output."""
    sources: tuple[SourceConfig, ...] = ()
    """Several folders of one tokenizer instead of `data.path`: `[{path: wiki, weight: 2}, {path: code, weight: 1}]`.
    `weight` is a share of the samples; `epochs` instead says how often a source is gone through while the others are
    gone through as often as theirs say; without either each has the share of its size."""
    temperature: float = Field(default=1.0, gt=0)
    """Of `data.sources` without weight or epochs: shares are sizes to the power of 1 / temperature."""
    seq_length: int = Field(default=256, ge=2, le=2**24)
    """Tokens of one sample; a multiple of `model.block_size`."""
    shuffle_shards: int = Field(default=8, ge=1)
    """Samples are shuffled within windows of this many shards; a window is what a rank holds in memory."""
    document_boundaries: Literal["ignore", "positions", "mask"] = "ignore"
    """Between the documents of a sample: nothing; `positions` begins the backbone's rotary positions anew; `mask` also
    hides every other document from a token, in the backbone and in the head (needs `data.align_blocks`)."""
    align_blocks: bool = False
    """Let a document begin with a block of `model.block_size` tokens: the rest of its last block is filled with the
    end-of-document token, which counts as text."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a shard that cannot be had or read: `stop` says which and where; `skip` replaces its samples by others of its
    window from there on, the same on every rank, and counts them. More than a tenth of the shards always stop."""
    verify: Verify = "first"
    """When a shard is hashed while it is read, to be the manifest's: the `first` time that a process reads it after a
    start, `always`, or `never`. Another SHA-256 is damage (`data.on_error`); a copy in the cache is thrown away
    and fetched again, once. With `never`, a changed token that is in the vocabulary is trained on."""
    prefetch: int = Field(default=2, ge=1)
    """Global batches read ahead."""
    remote: RemoteConfig = RemoteConfig()

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.path and self.sources:
            raise ValueError(f"path {self.path!r} and sources are both set; leave out one of them")
        for name in ("weight", "epochs"):
            given = [getattr(source, name) is not None for source in self.sources]
            if any(given) and not all(given):
                raise ValueError(f"{name} is set for {sum(given)} of {len(given)} sources; set it for all or for none")
        told = [source for source in self.sources if source.weight is not None or source.epochs is not None]
        if told and told[0].weight is not None and told[0].epochs is not None:
            raise ValueError("sources have both weight and epochs; give one of them")
        if self.temperature != 1 and (told or len(self.sources) < 2):
            raise ValueError(
                f"temperature {self.temperature} is for several sources without weight or epochs; leave it out"
            )
        return self

    @property
    def folders(self) -> tuple[str, ...]:
        """Every data folder; the first one's tokenizer and codes are the run's."""
        return tuple(source.path for source in self.sources) or (self.path,)

    def check_set(self) -> None:
        """UserError if there is no data folder."""
        if not self.folders[0]:
            raise UserError(
                "data.path is not set; make a folder with `megatron-bit prepare INPUT --out DIR`, then data.path=DIR"
            )
