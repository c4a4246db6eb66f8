"""The commands of the SLURM launcher. Nothing here imports torch: a login node may be slow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from megatron_bit.commands.arguments import Args, split
from megatron_bit.errors import UserError

RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]


def submit(
    args: Annotated[Args, tyro.conf.arg(metavar="[CONFIG.yaml|RUN] [key=value ...]")] = (),
    *,
    cluster: Path | None = None,
    preset: str | None = None,
    sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    dry_run: bool = False,
) -> int:
    """Submit a run to SLURM. It comes back by itself after preemption, time limits, lost nodes and hangs.

    key=value overrides the configuration as in `train`; cluster.key=value overrides the profile: cluster.nodes=4
    cluster.time=12:00:00. Everything is checked first: degrees against nodes x GPUs, memory against the planner.

    Args:
        args: a YAML file or a run folder, then key=value pairs.
        cluster: the cluster profile, a YAML file; `megatron-bit cluster profiles` has examples.
        preset: laptop, 125m, 1b, 8b or bitlm.
        sweep: key=a,b,c: a run for each value, as one job array, in RUN/key=a ...; several give all combinations.
        dry_run: print the script; write and submit nothing.
    """
    from mbit_launcher import submit as launcher

    profile, configs = _read(args, cluster, preset, sweep)
    if dry_run:
        print(launcher.preview(configs, profile, requeue=True), end="")
        return 0
    done = launcher.sweep(configs, profile) if sweep else launcher.submit(configs[0], profile)
    for job in done:
        print(f"job {job.job}: {job.run}")
    return 0


def chain(
    count: Annotated[int, tyro.conf.Positional],
    args: Annotated[Args, tyro.conf.arg(metavar="[CONFIG.yaml|RUN] [key=value ...]")] = (),
    *,
    cluster: Path | None = None,
    preset: str | None = None,
    dry_run: bool = False,
) -> int:
    """Submit a run as N jobs, one after another: for clusters with short limits, or that requeue no jobs.

    Each job goes on where the one before has saved; those that are left when the run is finished end at once.

    Args:
        count: number of jobs.
        args: a YAML file or a run folder, then key=value pairs.
        cluster: the cluster profile, a YAML file.
        preset: laptop, 125m, 1b, 8b or bitlm.
        dry_run: print the script; write and submit nothing.
    """
    from mbit_launcher import submit as launcher

    if not 1 <= count <= 1000:
        raise UserError(f"chain {count}: the number of jobs has to be 1 to 1000")
    profile, configs = _read(args, cluster, preset, ())
    if dry_run:
        print(launcher.preview(configs, profile, requeue=False), end="")
        return 0
    done = launcher.submit(configs[0], profile, count)
    print(f"jobs {', '.join(job.job for job in done)}: {done[0].run}")
    return 0


def resume(run: RunFolder, args: Args = (), cluster: Path | None = None) -> int:
    """Submit a run again that was stopped or has given up, with the configuration and profile it had.

    Of a sweep's folder every run that is not finished, each as a job of its own. A run that was never submitted goes on
    here, on as many ranks as it had, unless --cluster says where to submit it.

    Args:
        run: run folder, or the folder of a sweep.
        args: key=value pairs that override them (cluster.key=value: the profile).
        cluster: another cluster profile.
    """
    from mbit_launcher.attempts import finished
    from mbit_launcher.profile import load_profile, split_overrides
    from mbit_launcher.status import find_some
    from mbit_launcher.submission import submissions

    from megatron_bit.io import trust
    from megatron_bit.run.folder import resolve_file

    runs = find_some(run)
    overrides, changes = split_overrides(args)
    if len(runs) == 1 and not submissions(runs[0]) and cluster is None:
        if changes:
            raise UserError(f"cluster.{changes[0]} has no use without a cluster: {runs[0]} was never submitted")
        return _resume_here(runs[0], overrides)
    prepared = []
    for one in runs:  # what is wrong with any of them is said before the first one is queued
        made = submissions(one)
        if not made and cluster is None:
            raise UserError(f"{one} was never submitted: give --cluster CLUSTER.yaml, or `megatron-bit train {one}`")
        folder = made[-1].folder if made else one
        config = resolve_file(folder / "config.yaml", (*overrides, f"run={one}"))
        if len(runs) > 1 and finished(one, config):
            print(f"{one}: finished")
            continue
        if cluster is None:
            made[-1].check_profile()
        prepared.append((one, config, load_profile(cluster or folder / "cluster.yaml", changes)))
    trust.check()
    from mbit_launcher import submit as launcher

    for one, config, profile in prepared:
        for job in launcher.resume(one, config, profile):
            print(f"job {job.job}: {job.run}", flush=True)
    return 0


def _resume_here(run: Path, overrides: tuple[str, ...]) -> int:
    from mbit_launcher import here

    from megatron_bit.commands.training import train

    count = here.ranks(run)
    print(f"{run} was never submitted: training it here, as `megatron-bit train {run} --nproc {count}`", flush=True)
    return train((str(run), *overrides), nproc=count)


def cancel(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")], now: bool = False
) -> int:
    """Stop runs: their jobs save, end and do not come back. `resume` goes on.

    Args:
        runs: run folders, also of runs that are trained on this machine without SLURM, or the folders of sweeps.
        now: kill the jobs at once; what was done since the last checkpoint is done again after `resume`.
    """
    from mbit_launcher import here
    from mbit_launcher import submit as launcher
    from mbit_launcher.silence import Patience, Silent
    from mbit_launcher.status import find_some
    from mbit_launcher.submission import submissions

    patience, silences = Patience(), []
    for run in [one for folder in runs for one in find_some(folder)]:
        try:
            print(launcher.cancel(run, now, patience) if submissions(run) else here.cancel(run, now), flush=True)
        except Silent as silence:  # what can be done without SLURM is done for every run
            silences.append(silence)
    if silences:
        raise Silent(silences[0].what, "; ".join(silence.advice for silence in silences))
    return 0


def status(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN ...]")] = (Path("runs"),),
    json: bool = False,
) -> int:
    """Show how runs are doing, a line each.

    Args:
        runs: run folders, or folders that hold them; default runs/.
        json: print JSON.
    """
    from mbit_launcher.status import main as run

    return run(runs, json)


def logs(
    run: RunFolder,
    follow: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False,
    lines: int = 100,
    attempt: str | None = None,
) -> int:
    """Show what all ranks of a run's newest attempt have said; the first error first.

    Args:
        run: run folder, or the folder of a sweep. Of a run that was never submitted, the steps are shown.
        follow: go on as more comes, over restarts, until the run is over.
        lines: of each file, the last this many.
        attempt: of this attempt, as `status` and the logs name it: 12.0
    """
    from mbit_launcher.logs import main as show
    from mbit_launcher.status import find_some

    if lines < 1:
        raise UserError(f"--lines {lines} has to be at least 1")
    return show(find_some(run), follow, lines, attempt)


def cluster() -> int:
    """Profiles of clusters, and a SLURM cluster on this machine to try things on: profiles, up, down, crash, boot."""
    raise UserError("`megatron-bit cluster` needs a command; see `megatron-bit cluster --help`")


def cluster_up(folder: Folder, nodes: int = 3, cpus: int = 8, gpus: int = 0) -> int:
    """Start a SLURM cluster on this machine, with nodes that can crash. Needs root, and SLURM installed.

    Partition `train` is preempted by partition `high`. Requeued jobs are back in seconds, not minutes.

    Args:
        folder: where it keeps its files; a short path.
        nodes: how many.
        cpus: cores that each node pretends to have.
        gpus: GPUs that each node pretends to have.
    """
    from mbit_launcher.minicluster import up

    for option, value, least in (("--cpus", cpus, 1), ("--gpus", gpus, 0)):
        if value < least:
            raise UserError(f"{option} {value} has to be at least {least}")
    conf = up(folder, nodes, cpus, gpus)
    print(f"{nodes} nodes are up; for SLURM's commands and ours:\nexport SLURM_CONF={conf}")
    return 0


def cluster_profiles(out: Path | None = None) -> int:
    """List the cluster profiles and job scripts that come with this, or copy them, to change them for a cluster.

    Args:
        out: folder to copy them to; what was changed there is left alone.
    """
    from mbit_launcher.profiles import main as show

    return show(out)


def cluster_down(folder: Folder) -> int:
    """End a cluster and all that runs on it.

    Args:
        folder: that it was started with.
    """
    from mbit_launcher.minicluster import down

    print(f"ended the cluster in {folder}" if down(folder) else f"no cluster runs in {folder}")
    return 0


def cluster_crash(folder: Folder, node: Annotated[str, tyro.conf.Positional]) -> int:
    """Kill everything on a node at once, as a power cut does, or the controller: jobs live on while it is away.

    Args:
        folder: of the cluster.
        node: such as n2, or slurmctld.
    """
    from mbit_launcher.minicluster import crash

    crash(folder.absolute(), node)
    return 0


def cluster_boot(folder: Folder, node: Annotated[str, tyro.conf.Positional]) -> int:
    """Start a node again that has crashed, or the controller.

    Args:
        folder: of the cluster.
        node: such as n2, or slurmctld.
    """
    from mbit_launcher.minicluster import boot

    boot(folder.absolute(), node)
    return 0


def _read(args: tuple[str, ...], cluster: Path | None, preset: str | None, sweep: tuple[str, ...]):
    """(profile, configurations) of a submission."""
    from mbit_launcher.profile import load_profile, split_overrides
    from mbit_launcher.submit import sweep_configs

    target, overrides = split(args, preset)
    if target is None and preset is None:
        raise UserError("nothing to submit: give CONFIG.yaml, a run folder, or --preset")
    if cluster is None:
        raise UserError(
            "--cluster CLUSTER.yaml is missing: partition, GPUs of a node and the like; `megatron-bit cluster profiles "
            "--out DIR` has some to begin with"
        )
    overrides, changes = split_overrides(overrides)
    return load_profile(cluster, changes), sweep_configs(target, overrides, preset, sweep)
