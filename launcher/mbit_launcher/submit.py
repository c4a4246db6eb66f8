"""Check a run on the login node, write down what it is made of, and hand it to SLURM. Imports no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mbit_launcher import here, slurm
from mbit_launcher.attempts import finished
from mbit_launcher.preflight import cordoned
from mbit_launcher.profile import ClusterProfile
from mbit_launcher.queueing import queue, settle
from mbit_launcher.render import check_path, render
from mbit_launcher.silence import Patience, Silent
from mbit_launcher.submission import Submission, create, newest, submissions, writing
from megatron_bit.config import Config, DataConfig
from megatron_bit.errors import UserError
from megatron_bit.io import trust
from megatron_bit.io.files import write_atomic
from megatron_bit.planning.dry_run import describe, with_vocabulary
from megatron_bit.run.folder import resolve, with_absolute_paths

_T = TypeVar("_T")


@dataclass(frozen=True)
class Submitted:
    """A job that SLURM has accepted."""

    job: str
    run: Path


def prepare(config: Config, profile: ClusterProfile) -> Config:
    """The configuration as the job will get it: checked against nodes and GPUs, every path absolute.

    Raises:
        UserError: degrees that do not fit nodes x GPUs, too little memory by the planner's estimate, data that is not
            there or that the model's bits cannot hold, a run that is finished already.
    """
    run = Path(config.run).absolute()
    check_path(run)
    # the job runs in another folder than this
    config = with_absolute_paths(config).model_copy(update={"run": str(run)})
    _check_there(config.data)
    with_vocabulary(config)  # refuses data that the model's bits cannot hold
    try:
        plan = describe(config, profile.world_size)
    except UserError as error:
        raise UserError(f"{profile.nodes} nodes x {profile.ranks} ranks: {error}") from None
    needed = plan["memory_bytes_per_rank"]["total"] / 2**30
    if profile.gpu_memory_gib is not None and needed > profile.gpu_memory_gib:
        raise UserError(
            f"a rank needs about {needed:.1f} GiB, and cluster.gpu_memory_gib is {profile.gpu_memory_gib:g}: raise "
            "parallel.tp, parallel.pp, parallel.zero_stage or cluster.nodes, lower train.micro_batch_size, or set "
            "parallel.recompute=full"
        )
    if finished(run, config):
        raise UserError(
            f"run {run} is finished: it has done train.steps {config.train.steps}; raise train.steps to go on"
        )
    return config


def _check_there(data: DataConfig) -> None:
    """UserError if a data folder of this machine is none; what is remote is looked at by the job."""
    data.check_set()
    key = "data.sources" if data.sources else "data.path"
    for folder in data.folders:
        if not trust.acts(folder) and not (Path(folder) / "manifest.json").exists():
            raise UserError(
                f"{key} {folder} has no manifest.json: `megatron-bit prepare INPUT --out {folder}` makes one"
            )


def submit(config: Config, profile: ClusterProfile, count: int = 1) -> list[Submitted]:
    """Submit a run; with `count` above 1 as a chain, each job after the one before, however that one ended.

    Raises:
        UserError: another job of this run is queued or runs, or SLURM refuses.
        Silent: SLURM has not answered; says whether a job is queued, or not known to be.
    """
    config, patience = prepare(config, profile), Patience()
    run = Path(config.run)
    if count == 1 and (found := _queued_before([config], profile, patience)):
        return found
    _check_free(run, patience)
    submission = create(config, profile)
    log = submission.logs / "job-%j.log"
    script = render(profile, [submission], log, cordoned(submission.cordon(profile)), requeue=count == 1)
    _write(submission, script)
    found: list[Submitted] = []
    for _ in range(count):
        after = (f"--dependency=afterany:{found[-1].job}",) if found else ()
        try:
            (job,) = queue([submission], profile, after, patience)
        except UserError as error:
            raise _after(found, error) from None
        found.append(Submitted(job, run))
    return found


def _after(queued: Sequence[Submitted], error: UserError) -> UserError:
    """What has gone wrong when a part of a chain is queued already."""
    if not queued:
        return error
    names = ", ".join(job.job for job in queued)
    return UserError(f"of the chain of {queued[0].run} job {names} is queued, and no more: {error}")


def _queued_before(configs: Sequence[Config], profile: ClusterProfile, patience: Patience) -> list[Submitted]:
    """The jobs of the very same submission if an earlier `submit` queued them without hearing of it; else nothing."""
    found: list[tuple[Submission, str, str]] = []
    for config in configs:
        made = submissions(Path(config.run))
        tokens = made[-1].untold() if made else []
        if len(tokens) != 1 or not made[-1].same(config, profile):
            return []
        _ask(made[-1].run, patience, lambda last=made[-1]: settle(last))
        job = made[-1].job_of(tokens[0])
        if job is None or not _ask(made[-1].run, patience, lambda job=job: slurm.jobs([job])):
            return []
        found.append((made[-1], tokens[0], job))
    for submission, token, job in found:
        submission.add_job(token, job)
    return [Submitted(job, submission.run) for submission, _, job in found]


def _ask(run: Path, patience: Patience, question: Callable[[], _T]) -> _T:
    """The answer of SLURM about a run's jobs, before anything was submitted. Raises Silent."""
    try:
        return patience.ask(question)
    except Silent as silence:
        advice = f"whether {run} has a job is not known, so none was submitted; try later (`scontrol ping`)"
        raise Silent(silence.what, advice) from None


def sweep(configs: Sequence[Config], profile: ClusterProfile) -> list[Submitted]:
    """Submit several runs as one job array, a task each. UserError as `submit`."""
    configs = [prepare(config, profile) for config in configs]
    mirror = configs[0].checkpoint.mirror
    if mirror and len(configs) > 1:
        raise UserError(
            f"checkpoint.mirror {mirror!r} would be of {len(configs)} runs, and each needs its own; leave it out"
        )
    patience = Patience()
    if found := _queued_before(configs, profile, patience):
        return found
    for config in configs:
        _check_free(Path(config.run), patience)
    made = [create(config, profile) for config in configs]
    script = render(profile, made, made[0].logs / "job-%A_%a.log", cordoned(made[0].cordon(profile)))
    for submission in made:
        _write(submission, script)
    jobs = queue(made, profile, (), patience)
    return [Submitted(job, submission.run) for job, submission in zip(jobs, made, strict=True)]


def sweep_configs(
    target: str | None, overrides: Sequence[str], preset: str | None, sweeps: Sequence[str]
) -> list[Config]:
    """A configuration for each combination of the values of `key=a,b,c`, in folders RUN/key=a of their own."""
    axes = []
    for item in sweeps:
        key, equals, values = item.partition("=")
        if not equals or not key or not all(values.split(",")):
            raise UserError(f"--sweep {item!r} is not key=value,value,...; write for example optim.lr=1e-3,3e-4")
        axes.append([f"{key}={value}" for value in values.split(",")])
    root = Path(resolve(target, tuple(overrides), preset).run)
    configs = []
    for pairs in itertools.product(*axes):
        name = re.sub(r"[^\w.=+,-]", "_", ",".join(pairs))
        configs.append(resolve(target, (*overrides, *pairs, f"run={root / name}"), preset))
    folders = [config.run for config in configs]
    if len(set(folders)) < len(folders):
        raise UserError(f"--sweep {' '.join(sweeps)} has the same value twice")
    return configs


def preview(configs: Sequence[Config], profile: ClusterProfile, requeue: bool) -> str:
    """The script that would be submitted; nothing is written."""
    made = []
    for config in configs:
        root = Path(prepare(config, profile).run) / "slurm"
        made.append(Submission(root / f"{len(submissions(root.parent)):04d}"))
    log = made[0].logs / ("job-%j.log" if len(made) == 1 else "job-%A_%a.log")
    return render(profile, made, log, cordoned(made[0].cordon(profile)), requeue)


def resume(run: Path, config: Config, profile: ClusterProfile) -> list[Submitted]:
    """Submit a run again that has stopped; removes its STOP file. UserError if it is still queued or runs."""
    patience = Patience()
    found = _queued_before([prepare(config, profile)], profile, patience)
    if not found:
        _check_free(run, patience)
    with writing(run / "slurm"):
        (run / "STOP").unlink(missing_ok=True)
    return found or submit(config, profile)


def cancel(run: Path, now: bool, patience: Patience) -> str:
    """End the jobs of a run's newest submission: those that run save first, unless `now`. Returns what was done.

    Raises:
        Silent: SLURM has not answered; says what is done all the same, and what remains to be.
    """
    submission = newest(run)
    try:
        return patience.ask(lambda: _cancel(run, submission, now))
    except Silent as silence:
        if now:
            advice = f"no job of {run} is known to have ended; call it again when `scontrol ping` says that SLURM is up"
            raise Silent(silence.what, f"{advice}, or without --now, whose STOP file needs no SLURM") from None
        with writing(run / "slurm"):
            (run / "STOP").touch()
        advice = (
            f"nothing is cancelled, but {run / 'STOP'} is there now: a job that runs saves and ends by itself, and one "
            f"that waits ends when it begins; to take it out of the queue, call `megatron-bit cancel {run}` again when "
            "`scontrol ping` says that SLURM is up"
        )
        raise Silent(silence.what, advice) from None


def _cancel(run: Path, submission: Submission, now: bool) -> str:
    settle(submission)
    live = slurm.jobs(submission.jobs())
    if not live:
        return f"{run}: no job of it is queued or runs"
    running = [job for job in live.values() if job.state == "RUNNING"]
    waiting = [job.id for job in live.values() if job.state != "RUNNING"]
    if now or not running:
        slurm.scancel(list(live))
        return f"{run}: cancelled {', '.join(live)}"
    with writing(run / "slurm"):
        (run / "STOP").touch()
    if waiting:
        slurm.scancel(waiting)
    names = ", ".join(job.id for job in running)
    more = f"; cancelled {', '.join(waiting)}" if waiting else ""
    return f"{run}: job {names} saves and ends within seconds (--now does not wait for it){more}"


def _check_free(run: Path, patience: Patience) -> None:
    """Two jobs of one run would wait for each other's lock: at most one submission is under way, and no process."""
    held = here.training(run)
    if held is not None and held.slurm_job is None:
        raise UserError(
            f"run {run} is trained by process {held.pid} on {held.host}: wait for it, or end it with `megatron-bit "
            f"cancel {run}` there"
        )
    for submission in reversed(submissions(run)):
        _ask(run, patience, lambda last=submission: settle(last))
        live = _ask(run, patience, lambda last=submission: slurm.jobs(last.jobs()))
        if live:
            job = next(iter(live.values()))
            raise UserError(
                f"job {job.id} of run {run} is {job.state}: wait for it, or end it with `megatron-bit cancel {run}`; "
                "several jobs one after another are made at once (`megatron-bit chain N`)"
            )
        return


def _write(submission: Submission, script: str) -> None:
    with writing(submission.folder):
        write_atomic(submission.script, script.encode())
        submission.script.chmod(0o755)
