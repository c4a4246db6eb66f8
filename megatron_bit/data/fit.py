"""Whether data and a model's bits fit together, known without torch: before a job is queued, too."""

from __future__ import annotations

from pathlib import Path

from megatron_bit.config import ModelConfig
from megatron_bit.data.manifest import Manifest, load_manifest
from megatron_bit.errors import UserError
from megatron_bit.io import trust

LEARNED = "semantic"  # the value of model.code


def code_path(folder: Path, bits: int) -> Path:
    """Where the trainer looks for the learned code of so many bits."""
    return folder / "codes" / f"{LEARNED}-{bits}.safetensors"


def missing_code(manifest: Manifest, bits: int) -> UserError:
    """That a data folder has no learned code of so many bits, and what makes it."""
    return UserError(
        f"model.code=semantic needs {code_path(manifest.folder, bits)}, which is not there; make it with "
        f"`megatron-bit codes {manifest.folder} --bits {bits}`"
    )


def fewest_bits(folder: str) -> int:
    """Bits that a token of a data folder needs: as many as a record has, or as its vocabulary asks for.

    Raises UserError: as `load_manifest`; a folder behind a URL or a command, which is not asked before the run begins.
    """
    if trust.acts(folder):
        raise UserError(
            f"model.bits auto looks into a folder of this machine, and data.path is {folder}; set model.bits"
        )
    manifest = load_manifest(folder, check_files=False)
    return manifest.raw_bits or max(1, (manifest.vocab_size - 1).bit_length())


def check_data(model: ModelConfig, manifest: Manifest) -> None:
    """UserError if the model cannot be trained on the data: its kind, its vocabulary, a code that is not learned."""
    if model.head.kind == "softmax":
        manifest.need_vocabulary("model.head.kind=softmax")
        return
    check_bits(manifest, model.code, model.bits)
    if model.code == LEARNED and not code_path(manifest.folder, model.bits).exists():
        raise missing_code(manifest, model.bits)


def check_bits(manifest: Manifest, code: str, bits: int) -> None:
    """UserError if one of data and model is of raw records and the other is not, or of other ones, or the vocabulary
    does not fit."""
    there = manifest.raw_bits
    if there and (code, bits) != ("raw", there):
        raise UserError(
            f"{manifest.folder} holds records of {there} bits, and model.code is {code} with {bits} bits; set "
            f"model.code=raw model.bits={there}"
        )
    if code == "raw" and not there:
        raise UserError(
            f"model.code is raw, and {manifest.folder} holds tokens of a vocabulary; make records with `megatron-bit "
            f"prepare --raw-bits {bits}`, or set model.code=binary"
        )
    if not there:
        check_fit(manifest.vocab_size, bits)


def check_fit(vocab_size: int, bits: int) -> None:
    """UserError if the vocabulary has more tokens than there are codes of `bits` bits."""
    if vocab_size > 2**bits:
        raise UserError(
            f"model.bits {bits} is too small: the data has a vocabulary of {vocab_size} tokens and {bits} bits "
            f"make {2**bits} codes; set model.bits={(vocab_size - 1).bit_length()}"
        )
