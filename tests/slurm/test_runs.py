"""The real trainer, 2 nodes x 2 ranks under gloo, through everything that happens to a run on a cluster."""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import Future
from typing import Any

import pytest
import tiny_runs
from mbit_launcher import minicluster
from on_cluster import BACKGROUND, DEAR, LONG, STEPS, Run, Stage, all_but, background, command, dear, slurm

START = 200  # seconds in which an attempt has begun to train, also on a busy machine


_MAKING = threading.Lock()  # scenarios are threads
_MADE: list[Run] = []


def undisturbed(stage: Stage) -> Run:
    """A run that nothing happens to, in a folder whose name could be misread. Whoever asks first makes it."""
    with _MAKING:
        if not _MADE:
            run = stage.real('it\'s "undisturbed" & 100% $-HOME')
            run.submit()
            assert run.wait_until_over(START) == ["finished"], run.everything()
            _MADE.append(run)
    return _MADE[0]


def consumed(run: Run, steps: int = STEPS) -> list[list[Any]]:
    """What each rank trained on in each step, as it was done last: [rank][step]."""
    result = []
    for rank in range(4):
        lines = (run.folder / "consumed" / f"rank-{rank:05d}.jsonl").read_text().splitlines()
        by_step = {record["step"]: record["samples"] for record in map(json.loads, lines)}
        assert sorted(by_step) == list(range(1, steps + 1))
        result.append([by_step[step] for step in sorted(by_step)])
    return result


def every_sample_once(run: Run, steps: int = STEPS) -> None:
    """Of the steps that the final weights come from: TP ranks share samples, DP ranks divide them."""
    ranks = consumed(run, steps)
    assert ranks[0] == ranks[1] and ranks[2] == ranks[3]
    flat = [sample for rank in (ranks[0], ranks[2]) for step in rank for batch in step for sample in batch]
    assert sorted(flat) == list(range(steps * tiny_runs.SETTINGS["train.global_batch_size"]))


def log(run: Run) -> list[tuple[int, float, float]]:
    records = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    return [(r["step"], r["tokens"], r["loss"]) for r in records]


def same(run: Run, other: Run) -> None:
    """Bit for bit: weights and moments, losses, and what every rank consumed, each step once."""
    for state in ("param", "exp_avg", "exp_avg_sq"):
        a, b = (tiny_runs.read_state(r.folder / "checkpoints" / f"step-{STEPS:08d}", state) for r in (run, other))
        assert tiny_runs.worst(a, b) == (0.0, tiny_runs.worst(a, b)[1]), state
    assert log(run) == log(other)
    assert [step for step, *_ in log(run)] == list(range(1, STEPS + 1))
    assert consumed(run) == consumed(other)
    every_sample_once(run)


@dear
def finishes(stage: Stage) -> None:
    run = undisturbed(stage)
    every_sample_once(run)
    assert (run.folder / "FINISHED").exists()
    row = run.status()
    assert row["state"] == "finished" and row["step"] == row["steps"] == row["checkpoint"] == STEPS
    assert row["tokens"] == STEPS * tiny_runs.SETTINGS["train.global_batch_size"] * 36
    assert row["loss"] > 0 and row["restarts"] == 0
    text = command("logs", run.folder)
    assert "all-reduce of 4 MiB over 4 ranks" in text and f"step {STEPS}/{STEPS}" in text
    assert "preflight: 2 nodes are fit: n6, n7" in text
    code = json.loads((run.folder / "slurm/0000/code.json").read_text())
    assert code["commit"] is None or len(code["commit"]) == 40
    rows = command("status", run.folder.parent).splitlines()
    assert rows[0].split()[:4] == ["run", "job", "state", "step"]
    assert any('it\'s "undisturbed"' in row and f"{STEPS}/{STEPS}" in row for row in rows)


@dear
def survives_a_killed_node_three_times(stage: Stage) -> None:
    draw = random.Random(7)
    run = stage.real("killed", pace=0.4, exclude=all_but("n3", "n4", "n5"))
    run.submit()
    killed: list[tuple[int, str]] = []
    for _ in range(3):
        after = len(killed)
        start = run.wait(lambda r: len(r.attempts()) > after and r.step() >= 0 and r.attempts()[-1], START)  # noqa: B023
        target = draw.randint(start["from_step"] + 1, min(start["from_step"] + 8, STEPS - 2))
        run.wait(lambda r: r.step() >= target, START)  # noqa: B023
        node = draw.choice(run.nodes())
        minicluster.crash(stage.cluster, node)
        killed.append((target, node))
        run.wait(lambda r: len(r.attempts()) > len(killed) or r.attempts()[-1]["outcome"], START)
        minicluster.boot(stage.cluster, node)
    outcomes = run.wait_until_over(START)
    assert outcomes[-1] == "finished" and len(outcomes) == 4, (killed, outcomes)
    assert set(outcomes[:3]) <= {"lost", "crashed", "taken"}
    same(run, undisturbed(stage))
    row = run.status()
    assert row["state"] == "finished" and row["restarts"] == 3


@dear
def preempted_ends_bit_identical(stage: Stage) -> None:
    run = stage.real("preempted", pace=0.3, exclude=all_but("n16", "n17"))
    run.submit()
    run.wait(lambda r: r.step() >= 4, START)
    high = (
        "--partition=high",
        "--nodes=2",
        "--nodelist=n16,n17",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 1",
    )
    slurm("sbatch", *high)
    assert run.wait_until_over(START) == ["asked", "finished"], run.everything()
    first, second = run.attempts()
    assert 4 <= first["step"] < STEPS and second["from_step"] == first["step"]
    lines = (run.folder / "consumed" / "rank-00000.jsonl").read_text().splitlines()
    assert len(lines) == STEPS  # nothing was done twice
    same(run, undisturbed(stage))


@dear
def a_hung_rank_is_found(stage: Stage) -> None:
    run = stage.real("hung", hang="2@8", hang_timeout=20)
    run.submit()
    assert run.wait_until_over(START) == ["hung", "finished"], run.everything()
    hung = run.attempts()[0]
    assert "no rank has done a step for hang_timeout 20 s; the last was 7" in hung["reason"]
    folder = run.folder / "slurm/0000/logs" / hung["attempt"]
    stacks = {int(path.name[5:10]): path.read_text() for path in folder.glob("rank-*.log")}
    assert sorted(stacks) == [0, 1, 2, 3]
    assert all("most recent call first" in text and "in train_step" in text for text in stacks.values())
    assert "inject/sitecustomize.py" in stacks[2].split("most recent call first")[-1].split("\n")[1]
    assert "hung: no rank has done a step" in run.log()
    same(run, undisturbed(stage))


@dear
def a_rank_that_does_not_answer_is_a_lost_node(stage: Stage) -> None:
    """The others give up before the watchdog does; torchrun makes 1 of the trainer's 87."""
    run = stage.real("unheard", {"parallel.timeout_minutes": 0.4}, hang="2@8", hang_timeout=300)
    run.submit()
    assert run.wait_until_over(2 * START) == ["lost", "finished"], run.everything()
    first, second = run.attempts()
    assert first["reason"].startswith("after step 7: rank 2 on n7 (last step 7, ")
    assert first["reason"].endswith("did not answer for parallel.timeout_minutes = 0.4")
    assert (first["step"], second["from_step"]) == (7, 5)
    assert not (run.folder / "RANK_LOST").exists()  # of an attempt before
    same(run, undisturbed(stage))


@dear
def a_stop_file_stops_it(stage: Stage) -> None:
    run = stage.real("stopped", pace=0.5)
    run.submit()
    run.wait(lambda r: r.step() >= 3, START)
    (run.folder / "STOP").touch()
    assert run.wait_until_over(START) == ["stopped"]
    step = run.attempts()[0]["step"]
    row = run.status()
    assert row["state"] == "stopped" and row["checkpoint"] == step < STEPS and "STOP" in row["reason"]
    assert not run.live()
    text = command("logs", run.folder)
    assert f"a STOP file; saved at step {step}" in text


@dear
def a_sweep_whose_last_task_crashes(stage: Stage) -> None:
    """SLURM gives the last task of an array the array's own number, by which it answers for all of them: what one task
    asks about itself, and its way back into the queue, may not be about the others."""
    values = ["1e-3", "5e-4", "2e-4"]
    run = stage.real("sweep", {"parallel.tp": 1}, pace=0.3, nodes=1)
    run.profile["environment"]["MBIT_TEST_CRASH"] = "optim.lr=2e-4@9"
    run.submit("--sweep", f"optim.lr={','.join(values)}")
    one, two, last = (Run(run.folder / f"optim.lr={value}", run.config, run.profile) for value in values)
    assert last.wait_until_over(2 * START) == ["crashed", "finished"], last.everything()
    first, second = last.attempts()
    assert "planted_crash" in first["reason"] and (first["step"], second["from_step"]) == (8, 5)
    for other in (one, two):  # neither ended nor begun again
        assert other.wait_until_over(START) == ["finished"], other.everything()
    assert len({tuple(loss for *_, loss in log(r)) for r in (one, two, last)}) == 3
    for r in (one, two, last):
        assert [step for step, *_ in log(r)] == list(range(1, STEPS + 1)) and (r.folder / "FINISHED").exists()


@background
def time_limits_met(stage: Stage) -> None:
    """SLURM looks at limits every 30 s: USR1 comes 60 to 90 s after the start, and at 5 s a step no attempt can end the
    run before it. How far each comes, none included, is the machine's affair; the third and later ones do not wait."""
    long = {"train.steps": LONG, "checkpoint.every": 1000}
    limited = stage.real("limited", long, pace="5,5,0", time="2", save_seconds=30, exclude=all_but("n1", "n2"))
    limited.submit()
    outcomes = limited.wait_until_over(550)
    assert outcomes[:2] == ["asked", "asked"] and outcomes[-1] == "finished", limited.everything()
    assert set(outcomes[2:-1]) <= {"asked"}, limited.everything()
    for before, after in zip(limited.attempts(), limited.attempts()[1:], strict=False):
        assert before["step"] >= before["from_step"] and after["from_step"] == before["step"]
    assert limited.attempts()[-1]["from_step"] > 0  # something was saved when it was asked, and gone on from
    every_sample_once(limited, LONG)
    assert [step for step, *_ in log(limited)] == list(range(1, LONG + 1))


@pytest.mark.parametrize("scenario", [*DEAR, *BACKGROUND])
def test_runs(scenario: str, under_way: dict[str, Future[None]]) -> None:
    under_way[scenario].result(timeout=600)
