"""What a run streams: one data folder or several, and how their samples are mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megatron_bit.config import DataConfig
from megatron_bit.data.manifest import Manifest, load_manifest
from megatron_bit.data.stream import streamed_tokens
from megatron_bit.errors import UserError

Tokens = Mapping[str, np.ndarray]  # by split: int64 [shards], tokens of each shard as it is streamed


@dataclass(frozen=True)
class Source:
    """One data folder of a mixture."""

    manifest: Manifest
    tokens: Tokens
    weight: float | None = None  # share of the samples, relative to the others'; None: as many as it has
    epochs: float | None = None  # share of the samples: so many times all it has


@dataclass(frozen=True)
class Corpus:
    """The sources of a run, all of one tokenizer."""

    sources: tuple[Source, ...]
    block_size: int = 1  # documents are filled up to blocks of so many tokens
    temperature: float = 1.0

    @classmethod
    def of(cls, manifest: Manifest, block_size: int = 1) -> Corpus:
        """One folder. Raises UserError as `streamed_tokens` does."""
        return cls((Source(manifest, _tokens(manifest, block_size)),), block_size)

    @property
    def manifest(self) -> Manifest:
        """Of the first source: tokenizer, vocabulary and learned codes are its, and the same for all."""
        return self.sources[0].manifest

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides which tokens a run sees: the manifest's, or of several and their shares."""
        if len(self.sources) == 1:
            return self.manifest.fingerprint
        shares = [[source.manifest.fingerprint, source.weight, source.epochs] for source in self.sources]
        return hashlib.sha256(json.dumps([shares, self.temperature]).encode()).hexdigest()

    def shares(self, seq_length: int) -> list[Fraction]:
        """Share of the samples of each source, relative to each other's; of every split the same."""
        samples = [int((source.tokens["train"] // seq_length).sum()) for source in self.sources]
        if self.sources[0].weight is not None:
            return [Fraction(str(source.weight)) for source in self.sources]
        if self.sources[0].epochs is not None:
            return [Fraction(str(s.epochs)) * count for s, count in zip(self.sources, samples, strict=True)]
        if self.temperature == 1:
            return [Fraction(count) for count in samples]
        tempered = [(count / max(samples)) ** (1 / self.temperature) for count in samples]
        return [Fraction(max(1, round(share * 10**6))) for share in tempered]


def open_corpus(data: DataConfig, block_size: int, check: bool, tokens: Sequence[Tokens] | None = None) -> Corpus:
    """The sources that the configuration names.

    Args:
        block_size: of the model.
        check: that every shard is there; so far as it can be known without fetching it.
        tokens: of each source, if another rank has counted them.

    Raises:
        UserError: as `load_manifest` and `streamed_tokens` do, or the sources are of different tokenizers.
    """
    block_size = block_size if data.align_blocks else 1
    manifests = [load_manifest(path, check, data.remote) for path in data.folders]
    for other in manifests[1:]:
        if other.tokenizer_sha256 != manifests[0].tokenizer_sha256:
            raise UserError(
                f"data.sources are of different tokenizers: {manifests[0].name} of {manifests[0].tokenizer_sha256}, "
                f"{other.name} of {other.tokenizer_sha256}; prepare one of them again with --tokenizer "
                f"{manifests[0].tokenizer_path}"
            )
        if other.raw_bits != manifests[0].raw_bits:
            raise UserError(
                f"data.sources do not mix: {manifests[0].name} holds records of {manifests[0].raw_bits} bits, "
                f"{other.name} of {other.raw_bits} (0: text)"
            )
    if tokens is None:  # not yet looked at by another rank
        for manifest in manifests:
            if not manifest.raw_bits:
                manifest.checked_tokenizer_path()
    if data.align_blocks:
        manifests[0].need_vocabulary("data.align_blocks")
    tokens = tokens or [_tokens(manifest, block_size) for manifest in manifests]
    settings = data.sources or [None] * len(manifests)
    sources = tuple(
        Source(manifest, counts, *((None, None) if setting is None else (setting.weight, setting.epochs)))
        for manifest, counts, setting in zip(manifests, tokens, settings, strict=True)
    )
    return Corpus(sources, block_size, data.temperature)


def _tokens(manifest: Manifest, block_size: int) -> Tokens:
    return {split: streamed_tokens(manifest, split, block_size) for split in manifest.splits}
