"""RUN/tokenizer/: what of its data a run takes along, so that its model can be used when the data have moved.

    manifest.json                        which data they were
    tokenizer.model, or tokenizer.json   and tokenizer_config.json
    codes/semantic-12.safetensors        if the model has a learned code

A data folder without shards: what opens one for its vocabulary opens this. Raw records have no vocabulary, and no such
folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_bit.config import Config
from megatron_bit.data.fit import LEARNED, code_path
from megatron_bit.data.hf_tokenizer import TOKENIZER_CONFIG
from megatron_bit.data.manifest import FILE_NAME, Manifest
from megatron_bit.errors import UserError
from megatron_bit.io.files import write_atomic

FOLDER = "tokenizer"


def take_along(run: Path, config: Config, manifest: Manifest) -> None:
    """Copy into the run folder what is not there yet, or is there with other bytes. Rank 0 calls it.

    Raises UserError: the tokenizer cannot be read, is not the manifest's, or the folder cannot be written.
    """
    if manifest.raw_bits:
        return
    try:
        for name, content in _contents(config, manifest):
            path = run / FOLDER / name
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, content)
    except OSError as error:
        raise UserError(f"run folder {run} cannot be used: {error.strerror} ({error.filename})") from None


def _contents(config: Config, manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    """(name in the folder, content), the manifest last: where it is, all is."""
    tokenizer = manifest.checked_tokenizer_path()
    yield manifest.tokenizer_file, tokenizer.read_bytes()
    beside = tokenizer.with_name(TOKENIZER_CONFIG)
    if tokenizer.suffix == ".json" and beside.exists():
        yield TOKENIZER_CONFIG, beside.read_bytes()
    if config.model.code == LEARNED and config.model.head.kind != "softmax":
        code = code_path(manifest.folder, config.model.bits)
        yield str(code.relative_to(manifest.folder)), code.read_bytes()
    yield FILE_NAME, manifest.to_json().encode()


def of_run(run: Path) -> Path | None:
    """The folder that a run has taken along; None for one of before, or where there is no run."""
    folder = run / FOLDER
    return folder if (folder / FILE_NAME).is_file() else None
