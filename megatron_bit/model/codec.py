"""Codes: token ids to bits and back. The table of V x B bits is the only thing here that grows with V."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from mbit_kernels.decode import nearest_token
from torch import Tensor, nn

from megatron_bit.config import ModelConfig
from megatron_bit.data.codes import load_code
from megatron_bit.data.fit import check_bits, check_fit
from megatron_bit.data.manifest import Manifest


def _binary(vocab_size: int, bits: int) -> Tensor:
    return torch.arange(vocab_size)


def _gray(vocab_size: int, bits: int) -> Tensor:
    ids = torch.arange(vocab_size)
    return ids ^ (ids >> 1)


def _random(vocab_size: int, bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(0xB17)
    if bits <= 22:
        return torch.randperm(2**bits, generator=generator)[:vocab_size]
    words = torch.empty(0, dtype=torch.int64)  # too many codes to permute: draw until enough are distinct
    while len(words) < vocab_size:
        words = torch.unique(torch.cat((words, torch.randint(2**bits, (vocab_size,), generator=generator))))
    return words[torch.randperm(len(words), generator=generator)[:vocab_size]]


# A code maps every id to a distinct integer below 2^bits; its binary digits are the bits. Add yours here.
CODES: dict[str, Callable[[int, int], Tensor]] = {"binary": _binary, "gray": _gray, "random": _random}


def learned_table(code: str, manifest: Manifest, bits: int) -> Tensor | None:
    """int8 [V, B]: the table of a code that is learned, from the data folder; None if it is one of CODES, or raw.

    Raises:
        UserError: the data is of another kind, the vocabulary does not fit, or the folder has no such code (the error
            says what makes it), or a damaged or foreign one.
    """
    check_bits(manifest, code, bits)
    return None if code == "raw" or code in CODES else torch.from_numpy(load_code(manifest, bits).table)


def build_codec(config: ModelConfig, vocab_size: int, learned: Tensor | None = None) -> Codec | RawCodec:
    """The code that a configuration asks for; `learned` as of `Codec`. Raises UserError as `Codec` does."""
    if config.code == "raw":
        return RawCodec(config.bits)
    return Codec(config.code, vocab_size, config.bits, learned)


def table_fingerprint(table: Tensor) -> str:
    """SHA-256 (hex) of a table of codes, int8 [V, B]."""
    return hashlib.sha256(f"{tuple(table.shape)}".encode() + table.cpu().contiguous().numpy().tobytes()).hexdigest()


class RawCodec(nn.Module):
    """Records as they are: bit j of a token is bit 7 - j % 8 of its byte j // 8, the highest bit first."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    @property
    def fingerprint(self) -> str:
        """What stands for the table that there is none of."""
        return hashlib.sha256(f"raw/{self.bits}".encode()).hexdigest()

    def encode(self, records: Tensor) -> Tensor:
        """uint8 [..., ceil(B / 8)] to int8 [..., B] bits of -1 and +1."""
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=records.device)
        bits = (records[..., None] >> shifts) & 1
        return bits.flatten(-2)[..., : self.bits].to(torch.int8) * 2 - 1

    def rows(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """A table of the records themselves, int8 [..., B] flattened to rows, and the row of each."""
        table = self.encode(records).flatten(0, -2)
        return torch.arange(len(table), device=records.device).view(records.shape[:-1]), table


class Codec(nn.Module):
    """Maps token ids to bits of -1 and +1 and bit logits to the nearest valid id."""

    table: Tensor

    def __init__(self, code: str, vocab_size: int, bits: int, learned: Tensor | None = None) -> None:
        """
        Args:
            learned: the table of a code that is not in CODES: int8 [V, B] of -1 and +1.

        Raises:
            UserError: the vocabulary has more tokens than there are codes of `bits` bits.
        """
        super().__init__()
        check_fit(vocab_size, bits)
        if learned is None:
            words = CODES[code](vocab_size, bits)
            digits = torch.arange(bits - 1, -1, -1)
            learned = (((words[:, None] >> digits) & 1) * 2 - 1).to(torch.int8)
        assert learned.shape == (vocab_size, bits) and learned.dtype == torch.int8, (learned.shape, learned.dtype)
        self.register_buffer("table", learned.clone(), persistent=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the table: two models with different codes are different models."""
        return table_fingerprint(self.table)

    def encode(self, ids: Tensor) -> Tensor:
        """int64 [...] ids to int8 [..., B] bits of -1 and +1."""
        return self.table[ids]

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and the table that has their bits, int8 [V, B]: what `noised_bits` takes."""
        return ids, self.table

    def decode(self, logits: Tensor) -> Tensor:
        """float [..., B] log-odds to int64 [...] ids."""
        return nearest_token(logits, self.table)
