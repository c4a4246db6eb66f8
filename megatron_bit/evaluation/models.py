"""A trained model of any head behind one interface: nats of given tokens, and new tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bit.config import Config
from megatron_bit.inference.generate import Generator
from megatron_bit.inference.hf.text_bitlm import Decoder

NOISE_SAMPLES = 16  # of a diffusion head that does not say how it was validated


class Model(ABC):
    """A language model with its tokenizer, in evaluation mode."""

    path: Path
    head: str  # diffusion, chain or softmax
    block_size: int  # tokens that are decided together
    context: int  # tokens of the longest row that `nats` takes, a multiple of block_size
    eos_id: int  # end of a document; of raw records there is none, and this is -1
    record_bits: int = 0  # of raw records, which its tokens are then: lists of bytes
    step: int | None  # of training; None if the folder does not say
    training: Config | None = None  # of a run of ours
    tokenizer_sha256: str = ""  # of the data folder's tokenizer; "" for a folder with one of its own
    overlap: float = 0.0  # of a chain that has learned from noisy blocks: nats are a bound along such a front
    noise_samples = NOISE_SAMPLES  # noise levels of a block, in one evaluation of a diffusion head

    @property
    def exact(self) -> bool:
        """Whether nats are the likelihood; those of a diffusion head, and along a front, are a bound of it, estimated
        with noise."""
        return self.head != "diffusion" and not self.overlap

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids, without any that begin or end a text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids that are a whole one (`decoder` has others); control tokens give nothing."""

    @cached_property
    def decoder(self) -> Decoder:
        """What makes text of tokens that continue others."""
        return Decoder(self.decode)

    @abstractmethod
    def nats(self, rows: Sequence[Sequence[int]], keys: Sequence[int], seed: int) -> list[Tensor]:
        """-ln p of every token given those before it, from the beginning of a text.

        A block model fills a row up in front to whole blocks with end-of-document tokens, whose nats are not among
        these. Those of a diffusion head are shares: only the sum of a whole block is a bound, because its tokens are
        denoised together.

        Args:
            rows: token ids, 1 to `context` of them each.
            keys: of the noise of a diffusion head, one for each row.

        Returns:
            float32 [len(row)] on the CPU, for each row; it does not depend on the other rows.
        """

    @abstractmethod
    def generate(
        self, rows: Sequence[Sequence[int]], tokens: int, keys: Sequence[int], seed: int, how: Mapping[str, Any]
    ) -> list[list[int]]:
        """Continue rows of one length (it may be 0) by exactly `tokens` tokens; an end of a document does not stop it.

        Args:
            keys: a (seed, key) with its row has one continuation, whatever the batch.
            how: what `check` allows.
        """

    @abstractmethod
    def greedy(self, contexts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> list[bool] | None:
        """Whether the continuation by the likeliest token each time begins with the target; None if undefined."""

    @abstractmethod
    def check(self, how: Mapping[str, Any]) -> None:
        """UserError for a way to generate that this head does not know."""


class BitModel(Model):
    """A BitLM, run by the code that `generate` runs."""

    def __init__(self, path: Path, generator: Generator) -> None:
        config = generator.model.config
        self.path, self._generator = path, generator
        self.head, self.block_size = config.head_kind, config.block_size
        self.context, self.step = config.max_position_embeddings, generator.step
        self.record_bits = 0 if generator.records is None else config.bits
        self.eos_id = -1 if self.record_bits else generator.eos_id

    @cached_property
    def decoder(self) -> Decoder:
        return self._generator.text.decoder

    def encode(self, text: str) -> list[int]:
        return self._generator.text.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._generator.text.decode(ids)

    def nats(self, rows: Sequence[Sequence[int]], keys: Sequence[int], seed: int) -> list[Tensor]:
        ids, mask = self._generator.padded(rows)
        width, device = ids.shape[1], self._generator.device
        score = self._generator.model.score(
            ids.to(device), mask.to(device), noise_samples=self.noise_samples, seed=seed,
            sequence_ids=torch.tensor(list(keys)), overlap=self.overlap,
        )  # fmt: skip
        assert score.nats_per_token is not None
        nats = score.nats_per_token.float().cpu()
        return [nats[i, width - len(row) :] for i, row in enumerate(rows)]

    def generate(
        self, rows: Sequence[Sequence[int]], tokens: int, keys: Sequence[int], seed: int, how: Mapping[str, Any]
    ) -> list[list[int]]:
        endless: Any = []  # no token ends a text
        return self._generator.run(rows, tokens, streamer=None, seed=seed, sequences=keys, eos_token_id=endless, **how)

    def greedy(self, contexts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> list[bool] | None:
        if self.head != "chain":
            return None
        made = self.generate(contexts, max(map(len, targets)), range(len(contexts)), 0, {"temperature": 0.0})
        return [new[: len(target)] == list(target) for new, target in zip(made, targets, strict=True)]

    def check(self, how: Mapping[str, Any]) -> None:
        self._generator.check(how)
