"""The run folder: what a run is, where it stands, and whether a configuration may continue it.

RUN/config.yaml         resolved configuration of the newest start
RUN/starts/0000.yaml    resolved configuration of every start
RUN/tokenizer/          tokenizer and code of the data, copied (belongings.py)
RUN/identity.json       what may not change: model, data, order of samples
RUN/checkpoints/        complete checkpoints
RUN/log.jsonl           one record a step
RUN/validation.jsonl    one record a validation
RUN/rolled_back.jsonl   records of steps that were done again, because the run died before it had saved them
RUN/heartbeats/         how far each rank is
RUN/FINISHED            there when train.steps are done
RUN/DIVERGED            says why a run has stopped by itself
RUN/rewind.json         the newest time that it went back because it had diverged
RUN/RANK_LOST           says which ranks did not answer the others
RUN/lock                held by the job that trains it
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from megatron_bit.config import Config, load_config, read_yaml, to_yaml
from megatron_bit.data.fit import fewest_bits
from megatron_bit.errors import UserError
from megatron_bit.io import strict_json, trust
from megatron_bit.io.files import write_atomic
from megatron_bit.run import belongings, rewind
from megatron_bit.run.checkpoints import checkpoints_of, read_meta, sweep
from megatron_bit.run.identity import compare_run, of_checkpoint, of_folder
from megatron_bit.run.lock import RunLock
from megatron_bit.run.log import roll_back

RUN_ID = "run id"


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
            where = f"run folder {run}"
            compare_run(of_folder(_stored(known), mine, where), mine, where)
        for line in (lock.acquire(), *sweep(run / "checkpoints"), *rewind.set_aside(run, rewind.read(run))):
            if line:
                print(line, flush=True)
    except OSError as error:
        raise UserError(f"run folder {run} cannot be used: {error.strerror} ({error.filename})") from None


def record_start(config: Config, mine: dict[str, Any], checkpoint: Path | None) -> dict[str, Any] | None:
    """Write down this start of the run; returns the checkpoint's meta. Rank 0 calls it, when nothing else can be wrong.

    Raises:
        UserError: the checkpoint is of another run, or the folder cannot be written.
    """
    run = Path(config.run)
    meta = None if checkpoint is None else read_meta(checkpoint)
    if meta is not None:
        where = f"checkpoint {checkpoint}"
        compare_run(of_checkpoint(meta, where), mine, where)
    try:
        (run / "starts").mkdir(exist_ok=True)
        own = _stored(run / "identity.json") if (run / "identity.json").exists() else {}
        mine[RUN_ID] = _run_id(own, meta, str(checkpoint))
        if RUN_ID not in own:
            write_atomic(run / "identity.json", json.dumps({**mine, **own, RUN_ID: mine[RUN_ID]}, indent=1).encode())
        for mark in ("FINISHED", "DIVERGED", "RANK_LOST"):  # written again when it has come to that again
            (run / mark).unlink(missing_ok=True)
        if meta is None:  # it begins anew, and has not gone back yet
            (run / rewind.NAME).unlink(missing_ok=True)
        trust.remember(*filter(trust.acts, (*config.data.folders, config.checkpoint.mirror)))
        resolved = to_yaml(config).encode()
        write_atomic(run / "starts" / f"{_next_start(run):04d}.yaml", resolved)
        write_atomic(run / "config.yaml", resolved)
        roll_back(run, 0 if meta is None else meta["state"]["step"])
    except OSError as error:
        raise UserError(f"run folder {run} cannot be used: {error.strerror} ({error.filename})") from None
    return meta


def _stored(known: Path) -> dict[str, Any]:
    """identity.json; UserError if it is no JSON object, or larger than one can be."""
    return strict_json.load(known, strict_json.OBJECT, str(known), strict_json.MIB, "choose another run=... folder")


def _run_id(own: dict[str, Any], meta: dict[str, Any] | None, where: str) -> str:
    """Which run this is: a checkpoint of another one of the same model and data, which a job that had lost its folder
    could have left here, is not continued. A folder that has no id yet takes that of its checkpoint."""
    mine, there = own.get(RUN_ID), (meta or {"identity": {}})["identity"].get(RUN_ID)
    if mine and there and mine != there:
        raise UserError(
            f"checkpoint {where} is of another run: {RUN_ID} is {there} there and {mine} here; take it away, or start "
            "a new run from it (train.init_from)"
        )
    return mine or there or secrets.token_hex(8)


def _next_start(run: Path) -> int:
    """Behind the highest there is, whatever was removed or lies there besides: nothing is overwritten."""
    numbers = [int(path.stem) for path in (run / "starts").glob("*.yaml") if path.stem.isdecimal()]
    return max(numbers, default=-1) + 1


def resolve(target: str | None, overrides: tuple[str, ...], preset: str | None) -> Config:
    """The configuration of `train TARGET key=value ...`: TARGET is a YAML file or an existing run folder."""
    if target is not None and Path(target).is_dir():
        saved = Path(target) / "config.yaml"
        if not saved.exists():
            raise UserError(f"{target} is a folder without config.yaml, so not a run; give a YAML file or a run folder")
        if preset is not None:
            raise UserError(f"--preset {preset} has no use here: {target} is a run, which has its configuration")
        return resolve_file(saved, (*overrides, f"run={target}"))
    return load_config(target, overrides, preset, fewest_bits=fewest_bits)


def resolve_file(saved: Path, overrides: tuple[str, ...]) -> Config:
    """The configuration that a start has written down. It is resolved, and may be somebody else's: no path in it is
    expanded, and what it would run or fetch is doubted until `trust.check`."""
    given = (str(saved), read_yaml(saved, "configuration", "give another run"))
    config = load_config(None, overrides, given=given, fewest_bits=fewest_bits)
    doubt(config, str(saved))
    return config


def doubt(config: Config, where: str) -> None:
    """What a configuration out of an artefact, the file `where`, would run or fetch: `trust.check` asks the user."""
    for folder in config.data.folders:
        trust.doubt(folder, where, "data.path={}" if config.data.path else "data.sources=... again")
    trust.doubt(config.checkpoint.mirror, where, "checkpoint.mirror={}")


def data_of(config: Config, where: str) -> str:
    """The data folder that a checkpoint's configuration (the file `where`) names; UserError if to open it is to run a
    command or to fetch from where the user has not said to."""
    folder = config.data.folders[0]
    trust.doubt(folder, where, "--data {}")
    trust.check()
    return folder


def vocabulary_of(config: Config, checkpoint: Path) -> str:
    """The folder that has the tokenizer and the code of a checkpoint: the run's own, or else the data. UserError as
    `data_of`."""
    own = belongings.of_run(checkpoint.absolute().parents[1])
    return data_of(config, str(checkpoint / "meta.json")) if own is None else str(own)


def with_absolute_paths(config: Config) -> Config:
    """The configuration with every path but `run` absolute, so that the run goes on from any folder. What is behind a
    URL or a command, and a name that is no file, stays."""

    def place(name: str) -> str:
        return name if not name or trust.acts(name) else str(Path(name).absolute())

    data, start = config.data, config.train.init_from
    sources = tuple(source.model_copy(update={"path": place(source.path)}) for source in data.sources)
    remote = data.remote.model_copy(update={"cache": place(data.remote.cache)})
    data = data.model_copy(update={"path": place(data.path), "sources": sources, "remote": remote})
    start = place(start) if start is not None and Path(start).exists() else start
    train = config.train.model_copy(update={"init_from": start})
    checkpoint = config.checkpoint.model_copy(update={"mirror": place(config.checkpoint.mirror)})
    return config.model_copy(update={"data": data, "train": train, "checkpoint": checkpoint})


def newest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run (or `run` itself, if it is one); UserError if there is none."""
    return checkpoints_of(run)[-1]
