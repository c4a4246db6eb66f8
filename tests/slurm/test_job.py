"""What the job does with SLURM, with a trainer that costs nothing: each end that an attempt can have."""

from __future__ import annotations

import email
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import yaml
from mbit_launcher import minicluster
from on_cluster import CHEAP, COMMAND, Run, Stage, all_but, cheap, command, slurm


@cheap
def finishes_in_a_folder_with_spaces_and_quotes(stage: Stage) -> None:
    run = stage.stand_in(name='it\'s a "run" of 100% $-HOME `id`/a b')
    run.profile["environment"]["ODD"] = 'it\'s "$HOME" `id`'
    said = run.submit()
    assert str(run.folder) in said
    assert run.wait_until_over() == ["finished"]
    assert (run.folder / "FINISHED").exists()
    assert {p.name for p in run.folder.glob("slurm/0000/logs/*/rank-*")} == {
        f"rank-0000{rank}.{node}.log" for rank, node in enumerate(["n6", "n6", "n7", "n7"])
    }
    assert "finished" in run.submit(code=2)  # there is nothing left to do


@cheap
def a_crash_at_the_same_step_twice_is_the_end(stage: Stage) -> None:
    run = stage.stand_in("crash@7")
    run.submit()
    assert run.wait_until_over() == ["crashed", "crashed"]
    first, second = run.attempts()
    assert (first["from_step"], first["step"], second["from_step"], second["step"]) == (0, 6, 5, 6)
    row = run.status()
    assert row["state"] == "failed" and row["restarts"] == 1 and row["checkpoint"] == 5
    assert "rank 1 on n6: RuntimeError: planted in step 7" in row["reason"]
    assert "the second time after step 6" in row["reason"]
    text = command("logs", run.folder)
    assert text.startswith("first failure of attempt") and "rank 1 on n6" in text.splitlines()[0]
    assert text.index("RuntimeError: planted in step 7") < text.index("==> job")


@cheap
def a_hang_is_ended_with_the_stacks_of_all_ranks(stage: Stage) -> None:
    run = stage.stand_in("hang@4", hang_timeout=8)
    run.submit()
    assert run.wait_until_over() == ["hung", "finished"]
    hung = run.attempts()[0]
    assert "no rank has done a step for hang_timeout 8 s; the last was 3" in hung["reason"]
    logs = sorted((run.folder / "slurm/0000/logs" / hung["attempt"]).glob("rank-*.log"))
    assert len(logs) == 4
    for path in logs:
        text = path.read_text()
        assert "most recent call first" in text and "in train" in text, text


@cheap
def preempted_saves_and_comes_back(stage: Stage) -> None:
    run = stage.stand_in(steps=30, exclude=all_but("n8", "n9"))
    run.submit()
    run.wait(lambda r: r.step() >= 3)
    high = ("--partition=high", "--nodes=2", "--nodelist=n8,n9", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    job = slurm("sbatch", "--parsable", *high).strip()
    assert run.wait_until_over() == ["asked", "finished"]
    first, second = run.attempts()
    assert second["from_step"] == first["step"] >= 3  # nothing is done twice
    assert slurm("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip() == "COMPLETED"


@cheap
def a_save_that_hangs_does_not_keep_it_from_coming_back(stage: Stage) -> None:
    run = stage.stand_in("slow", steps=80, save_seconds=10, max_restarts=1)
    run.submit()
    run.wait(lambda r: r.step() >= 3)
    (job,) = [line.split()[0] for line in run.live()]
    slurm("scancel", "--batch", "--signal=USR1", job)
    run.wait(lambda r: len(r.attempts()) == 2)
    assert run.outcomes()[0] == "asked"
    assert "the ranks have not stopped in 8 s" in run.log()
    command("cancel", "--now", run.folder)
    run.wait(lambda r: not r.live())
    assert run.status()["state"] in ("ended", "cancelled")


@cheap
def cancel_saves_and_resume_goes_on(stage: Stage) -> None:
    run = stage.stand_in(steps=80)
    run.submit()
    run.wait(lambda r: r.step() >= 2)
    assert "is RUNNING" in run.submit(code=2)
    assert "saves and ends" in command("cancel", run.folder)
    assert run.wait_until_over() == ["stopped"]
    stopped = run.attempts()[0]["step"]
    assert 2 <= stopped < 80 and run.status()["checkpoint"] == stopped
    assert run.status()["reason"].startswith("stopped: a STOP file; saved at step")
    command("resume", run.folder)
    assert run.wait_until_over() == ["stopped", "finished"]
    assert run.attempts()[1]["from_step"] == stopped and not (run.folder / "STOP").exists()


@cheap
def a_lost_node_is_left_behind(stage: Stage) -> None:
    run = stage.stand_in(steps=40, exclude=all_but("n13", "n14", "n15"))
    run.submit()
    run.wait(lambda r: r.step() >= 7)
    lost = run.nodes()[1]
    minicluster.crash(stage.cluster, lost)
    try:
        outcomes = run.wait_until_over()
    finally:
        minicluster.boot(stage.cluster, lost)
    assert outcomes[-1] == "finished" and len(outcomes) == 2, outcomes
    second = run.attempts()[1]
    assert lost not in second["nodes"].split(",")
    assert second["from_step"] >= 5


@cheap
def a_bad_node_is_named_and_excluded(stage: Stage) -> None:
    run = stage.stand_in(exclude=all_but("n10", "n11", "n12"), gpus_per_node=2)
    smi = run.folder.with_name("bin") / "nvidia-smi"
    smi.parent.mkdir()
    busy = '[ "$SLURMD_NODENAME" = n10 ] && used=40000 || used=3'
    smi.write_text(f'#!/bin/sh\n{busy}\necho "0, $used, 0"\necho "1, 3, [N/A]"\n')
    smi.chmod(0o755)
    run.profile["environment"]["PATH"] = f"{smi.parent}:/usr/bin:/bin"
    run.submit()
    assert run.wait_until_over() == ["preflight", "finished"], run.everything()
    first, second = run.attempts()
    assert first["nodes"] == "n10,n11" and second["nodes"] == "n11,n12"
    assert "node n10: GPU 0 is not idle: 40000 MiB are in use" in first["reason"]
    assert (run.folder / "slurm" / "cordon").read_text().startswith("n10  # ")
    assert f"--exclude={run.profile['exclude']},n10\n" in run.submit("--dry-run", "train.steps=99")


@cheap
def a_chain_goes_on_where_the_job_before_has_saved(stage: Stage) -> None:
    run = stage.stand_in(steps=30)
    said = run.submit(verb=("chain", "3"))
    assert said.count(",") >= 2
    run.wait(lambda r: r.step() >= 3)
    (first,) = [line.split()[0] for line in run.live() if "RUNNING" in line]
    slurm("scancel", "--batch", "--signal=USR1", first)
    assert run.wait_until_over() == ["asked", "finished"]
    jobs = [a["job"] for a in run.attempts()]
    assert len(set(jobs)) == 2  # not requeued: another job
    assert run.attempts()[1]["from_step"] == run.attempts()[0]["step"]


@cheap
def a_sweep_is_one_array(stage: Stage) -> None:
    run = stage.stand_in(steps=3)
    said = run.submit("--sweep", "optim.lr=1e-3,3e-4")
    folders = [run.folder / "optim.lr=1e-3", run.folder / "optim.lr=3e-4"]
    runs = [Run(folder, run.config, run.profile) for folder in folders]
    for one in runs:
        assert one.wait_until_over() == ["finished"]
    ids = [line.split()[1].rstrip(":") for line in said.splitlines()]
    assert ids[0].split("_")[0] == ids[1].split("_")[0] and ids[0].endswith("_0") and ids[1].endswith("_1")
    rows = command("status", run.folder).splitlines()
    assert len(rows) == 3 and all("finished" in row for row in rows[1:])
    lr = [yaml.safe_load((f / "slurm/0000/config.yaml").read_text())["optim"]["lr"] for f in folders]
    assert lr == [1e-3, 3e-4]
    assert command("resume", run.folder) == "".join(f"{folder}: finished\n" for folder in folders)
    command("resume", run.folder, "train.steps=4")  # which they are not
    for one in runs:
        assert one.wait_until_over() == ["finished", "finished"]


@cheap
def a_sweep_is_watched_ended_and_resumed_by_its_folder(stage: Stage) -> None:
    run = stage.stand_in(steps=900)  # three minutes: both are under way at the same time, however busy the machine is
    run.submit("--sweep", "optim.lr=1e-3,3e-4")
    runs = [Run(run.folder / name, run.config, run.profile) for name in ("optim.lr=1e-3", "optim.lr=3e-4")]
    for one in runs:
        one.wait(lambda r: r.step() >= 2)
    said = command("cancel", run.folder)
    for one, line in zip(runs, said.splitlines(), strict=True):
        assert str(one.folder) in line and "saves and ends" in line
    for one in runs:
        assert one.wait_until_over() == ["stopped"]
    text = command("logs", run.folder)
    assert [line for line in text.splitlines() if line.startswith("==== ")] == [f"==== {one.folder}" for one in runs]
    assert text.count(": stopped: a STOP file") == 2
    command("logs", run.folder, "--attempt", "1.0", code=2)
    saved = max(one.status()["checkpoint"] for one in runs)
    resumed = command("resume", run.folder, f"train.steps={saved + 5}")
    assert [line.split(": ")[1] for line in resumed.splitlines()] == [str(one.folder) for one in runs]
    followed = command("logs", "-f", run.folder, timeout=300)
    for one in runs:
        assert one.wait_until_over() == ["stopped", "finished"]
        assert any(line.startswith(f"{one.folder.name} job ") and "finished" in line for line in followed.splitlines())


@cheap
def text_is_prepared_by_an_array(stage: Stage) -> None:
    """slurm/prepare.sbatch as it is shipped, on a cluster as `cluster up` makes it."""
    folder = stage.stand_in(name="prepare").folder
    text = str(Path(email.__file__).parent)
    command("cluster", "profiles", "--out", folder / "profiles")
    program = ("--export", f"ALL,MEGATRON_BIT={COMMAND}", "--output", f"{folder}/%A-%a.log", "--parsable", "--wait")
    script = str(folder / "profiles" / "prepare.sbatch")
    slurm("sbatch", *program, "--array=0-1", script, f"{folder}/data", text, "--vocab-size", "421")
    slurm("sbatch", *program, script, "--join", f"{folder}/data")
    assert "train-0001-000000.tar" in {path.name for path in (folder / "data").iterdir()}
    command("data", "verify", folder / "data")


@cheap
def follow_shows_every_rank_over_a_restart(stage: Stage) -> None:
    run = stage.stand_in("crash@4")
    run.submit()
    run.wait(lambda r: r.attempts())
    begin = time.monotonic()
    text = command("logs", "-f", run.folder, timeout=300)
    assert time.monotonic() - begin > 3
    assert [rank for rank in range(4) if f"rank {rank} n" in text] == [0, 1, 2, 3]
    for attempt in run.attempts():  # the second began when the first had been shown
        assert f"attempt {attempt['attempt']}: crashed" in text
    assert text.count("rank 1 n6 RuntimeError: planted in step 4") == 2


@pytest.mark.parametrize("scenario", CHEAP)
def test_job(scenario: str, under_way: dict[str, Future[None]]) -> None:
    under_way[scenario].result(timeout=500)
