"""The run folder: what a run is, where it stands, and whether a configuration may continue it.

RUN/config.yaml         resolved configuration of the newest start
RUN/starts/0000.yaml    resolved configuration of every start
RUN/identity.json       what may not change: model, data, order of samples
RUN/checkpoints/        complete checkpoints
RUN/log.jsonl           one record a step
RUN/validation.jsonl    one record a validation
RUN/rolled_back.jsonl   records of steps that were done again, because the run died before it had saved them
RUN/heartbeats/         how far each rank is
RUN/FINISHED            there when train.steps are done
RUN/lock                held by the job that trains it
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megatron_bit.checkpoint.folder import checkpoints_of, read_meta, sweep
from megatron_bit.config import Config, ModelConfig, load_config, to_yaml
from megatron_bit.errors import UserError
from megatron_bit.files import write_atomic
from megatron_bit.run_lock import RunLock
from megatron_bit.run_log import roll_back

if TYPE_CHECKING:
    from megatron_bit.data.corpus import Corpus  # which imports numpy; a plan does without

# what runs have that were made before a key
YOUNGER = {
    "diffusion.self_condition above 0": False,
    "data.document_boundaries": "ignore",
    "data.align_blocks": False,
}


def identity(config: Config, corpus: Corpus, code: str) -> dict[str, Any]:
    """What every start of a run has to share. `code` is the fingerprint of the table of codes."""
    manifest = corpus.manifest
    return {
        "model": config.model.model_dump(mode="json", exclude={"vocab_size"}),  # which the data has, below
        "diffusion.self_condition above 0": config.diffusion.self_condition > 0,  # an input of the head
        "train.seed": config.train.seed,
        "data.seq_length": config.data.seq_length,
        "data.shuffle_shards": config.data.shuffle_shards,
        "data.document_boundaries": config.data.document_boundaries,
        "data.align_blocks": config.data.align_blocks,
        "vocabulary size": manifest.vocab_size,
        "code table": code,
        "data": corpus.fingerprint,
        "tokenizer": manifest.tokenizer_sha256,
    }


def claim(config: Config, mine: dict[str, Any], lock: RunLock) -> None:
    """Make or open the run folder for this job alone, and clear what killed saves have left. Rank 0 calls it.

    Raises:
        UserError: another job uses it, it holds a run of another model or other data, or it cannot be written.
    """
    run = Path(config.run)
    known = run / "identity.json"
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        if known.exists():
            compare(json.loads(known.read_text()), mine, f"run folder {run}")
        for line in (lock.acquire(), *sweep(run / "checkpoints")):
            if line:
                print(line, flush=True)
    except OSError as error:
        raise UserError(f"run folder {run} cannot be used: {error.strerror} ({error.filename})") from None
    except ValueError as error:
        raise UserError(f"{known} is not readable: {error}; choose another run=... folder") from None


def record_start(config: Config, mine: dict[str, Any], checkpoint: Path | None) -> dict[str, Any] | None:
    """Write down this start of the run; returns the checkpoint's meta. Rank 0 calls it, when nothing else can be wrong.

    Raises:
        UserError: the checkpoint is of another run, or the folder cannot be written.
    """
    run = Path(config.run)
    meta = None if checkpoint is None else read_meta(checkpoint)
    if meta is not None:
        compare(meta["identity"], mine, f"checkpoint {checkpoint}")
    try:
        (run / "starts").mkdir(exist_ok=True)
        if not (run / "identity.json").exists():
            write_atomic(run / "identity.json", json.dumps(mine, indent=1).encode())
        (run / "FINISHED").unlink(missing_ok=True)  # written again when the last step is saved
        resolved = to_yaml(config).encode()
        write_atomic(run / "starts" / f"{len(list((run / 'starts').iterdir())):04d}.yaml", resolved)
        write_atomic(run / "config.yaml", resolved)
        roll_back(run, 0 if meta is None else meta["state"]["step"])
    except OSError as error:
        raise UserError(f"run folder {run} cannot be used: {error.strerror} ({error.filename})") from None
    return meta


def resolve(target: str | None, overrides: tuple[str, ...], preset: str | None) -> Config:
    """The configuration of `train TARGET key=value ...`: TARGET is a YAML file or an existing run folder."""
    if target is not None and Path(target).is_dir():
        saved = Path(target) / "config.yaml"
        if not saved.exists():
            raise UserError(f"{target} is a folder without config.yaml, so not a run; give a YAML file or a run folder")
        return load_config(saved, (*overrides, f"run={target}"))
    return load_config(target, overrides, preset)


def newest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run (or `run` itself, if it is one); UserError if there is none."""
    return checkpoints_of(run)[-1]


def compare(there: dict[str, Any], mine: dict[str, Any], where: str) -> None:
    """UserError with the first key of `mine` that is another one `there`, which is said to be at `where`."""
    if not isinstance(there, dict):
        raise UserError(f"{where} has an identity that is not one: {_short(there)}; choose another run=... folder")
    there = {**YOUNGER, **there}
    if "model" in there:  # a key that is younger than the run has its default there
        with contextlib.suppress(ValidationError):
            there = {**there, "model": ModelConfig.model_validate(there["model"]).model_dump(mode="json")}
    for key, value in mine.items():
        other = there.get(key, YOUNGER.get(key))
        if other == value:
            continue
        if isinstance(value, dict) and isinstance(other, dict):
            compare(_prefixed(other, key), _prefixed(value, key), where)
            continue
        raise UserError(
            f"{where} is of another run: {key} is {_short(other)} there and {_short(value)} here; "
            "choose another run=... folder, or set it back"
        )


def _prefixed(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for key, value in tree.items()}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 64 else f"{text[:12]}..."  # a hash is shown whole
