"""Nothing that happens to a job or a disk loses the last complete checkpoint, or loads a wrong one."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import group_ranks
import pytest
import tiny_runs
from gloo_ranks import end_ranks, run_ranks

from megatron_bit.run.checkpoints import complete, newest_step, problems, step_of
from megatron_bit.run.lock import RunLock

DP2 = {"parallel.zero_stage": 1, "train.global_batch_size": 2, "checkpoint.every": 1, "checkpoint.keep": 2}


def _arguments(run: Path, data: Path, **settings: Any) -> list[str]:
    return tiny_runs.overrides(run, data, {**DP2, **settings})


def _newest(run: Path) -> int:
    return newest_step(run / "checkpoints")


def test_killed_at_twenty_moments_of_saving(tiny_data: Path, tmp_path: Path) -> None:
    """One run, killed twenty times at random disk operations, ends with the weights of one that was never killed."""
    draw = random.Random(5)
    run, newest, survived = tmp_path / "run", 0, 0
    arguments = _arguments(run, tiny_data, **{"train.steps": 400})
    for trial in range(20):
        victims = ("all", "0", "1")[trial % 3]
        operation = draw.randint(1, 12 if victims == "1" else 50)
        with pytest.raises(AssertionError, match=r"died without a result|failed:"):
            run_ranks(tiny_runs.train_killed, 2, arguments, victims, operation)
            survived += 1
        found = complete(run / "checkpoints")
        assert all(problems(folder) == [] for folder in found), (victims, operation)
        step = newest_step(run / "checkpoints")
        assert step >= newest, f"{victims} killed at operation {operation}: the newest was {newest} and is {step}"
        newest = step
    assert survived == 0 and newest > 5
    for folder in (run, tmp_path / "whole"):
        again = _arguments(folder, tiny_data, **{"train.steps": 400, "train.stop_at": newest + 2})
        assert set(run_ranks(tiny_runs.train, 2, again)) == {0}
    difference, where = tiny_runs.worst(
        tiny_runs.read_state(complete(run / "checkpoints")[-1], "param"),
        tiny_runs.read_state(complete(tmp_path / "whole" / "checkpoints")[-1], "param"),
    )
    assert difference == 0.0, where
    assert not [p for p in (run / "checkpoints").iterdir() if p.suffix]


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("faults") / "run"
    run_ranks(tiny_runs.train, 2, _arguments(run, tiny_data, **{"train.stop_at": 3}))
    return run


FILES = ["rank-00000.safetensors", "rank-00001.safetensors", "index.json", "meta.json", "hashes.json", "COMMITTED"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
def test_any_change_of_any_file_is_seen(name: str, how: str, trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(complete(trained / "checkpoints")[-1], tmp_path / "copy"))
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    path = folder / name
    data = bytearray(path.read_bytes())
    data[random.Random(name).randrange(len(data))] ^= 4
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes(data if how == "flip" else data[:-1])
    assert problems(folder)


def test_a_damaged_checkpoint_is_skipped_and_said(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    newest = complete(run / "checkpoints")[-1]
    path = newest / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    run_ranks(tiny_runs.aloud, 2, _arguments(run, tiny_data, **{"train.stop_at": 4}), tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert "skipping checkpoint step-00000003" in said and "rank-00001.safetensors has changed" in said
    assert "continuing" in said and "at step 2" in said
    assert _newest(run) == 4 and all(problems(folder) == [] for folder in complete(run / "checkpoints"))


@pytest.mark.parametrize("background", [True, False])
def test_one_failed_save_is_reported_and_training_goes_on(background: bool, tiny_data: Path, tmp_path: Path) -> None:
    arguments = _arguments(tmp_path / "run", tiny_data, **{"checkpoint.background": background, "checkpoint.keep": 9})
    run_ranks(tiny_runs.aloud, 2, arguments, tmp_path / "said", "train_full_disk", (2,), 1)
    said = (tmp_path / "said").read_text()
    assert "warning: checkpoint step 2 is not saved" in said and "File too large (rank 1; 1 of 2 ranks)" in said
    assert [step_of(p.name) for p in complete(tmp_path / "run" / "checkpoints")] == [1, 3, 4, 5]
    assert not [p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.suffix]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_disk_that_stalls_and_comes_back(victim: int, tiny_data: Path, tmp_path: Path) -> None:
    """The save that was given up does not appear, and none of the others has a value of another step."""
    settings = {"checkpoint.keep": 99}
    assert set(run_ranks(tiny_runs.train_stalled, 2, _arguments(tmp_path / "run", tiny_data, **settings), victim)) == {
        0
    }
    assert set(run_ranks(tiny_runs.train, 2, _arguments(tmp_path / "whole", tiny_data, **settings))) == {0}
    run, whole = (tmp_path / name / "checkpoints" for name in ("run", "whole"))
    assert [p.name for p in complete(run)] == [p.name for p in complete(whole) if p.name != "step-00000002"]
    for folder in complete(run):
        assert problems(folder) == []
        for state in ("param", "exp_avg"):
            both = (tiny_runs.read_state(root / folder.name, state) for root in (run, whole))
            assert tiny_runs.worst(*both)[0] == 0.0, folder
    assert [p.name for p in run.iterdir() if p.suffix] == []


def test_two_failed_saves_in_a_row_end_the_run_with_the_last_good_one_left(tiny_data: Path, tmp_path: Path) -> None:
    arguments = _arguments(tmp_path / "run", tiny_data)
    with pytest.raises(AssertionError, match=r"UserError: checkpoint step 3 is not saved: .*2 in a row"):
        run_ranks(tiny_runs.train_full_disk, 2, arguments, (2, 3), 0)
    assert _newest(tmp_path / "run") == 1
    assert problems(complete(tmp_path / "run" / "checkpoints")[-1]) == []


def test_the_last_save_has_to_succeed(tiny_data: Path, tmp_path: Path) -> None:
    arguments = _arguments(tmp_path / "run", tiny_data, **{"train.stop_at": 2})
    with pytest.raises(AssertionError, match=r"UserError: checkpoint step 2 is not saved: .*File too large"):
        run_ranks(tiny_runs.train_full_disk, 2, arguments, (2,), 1)
    assert _newest(tmp_path / "run") == 1 and not (tmp_path / "run" / "FINISHED").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(run / "checkpoints")]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        with pytest.raises(AssertionError, match=r"UserError: checkpoint step \d is not saved: .*(MiB free|No space)"):
            run_ranks(tiny_runs.train, 2, _arguments(run, tiny_data, **{"checkpoint.keep": 99}))
        found = complete(run / "checkpoints")
        assert found and all(problems(folder) == [] for folder in found)
    finally:
        subprocess.run(["umount", str(run / "checkpoints")], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
@pytest.mark.parametrize("log", ["log.jsonl", "validation.jsonl"])
def test_a_full_disk_under_a_log(log: str, tiny_data: Path, tmp_path: Path) -> None:
    """One line, nothing raised while closing, and the save in flight is completed."""
    run, full = tmp_path / "run", tmp_path / "full"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)], check=False).returncode:
        pytest.skip("this container may not mount")
    try:
        (full / log).touch()
        subprocess.run(["dd", "if=/dev/zero", f"of={full}/fill", "bs=1k"], check=False, capture_output=True)
        run.mkdir()
        (run / log).symlink_to(full / log)
        settings = {"evaluate.every": 2, "evaluate.initial": False, "evaluate.samples": 2, "checkpoint.every": 2}
        with pytest.raises(AssertionError, match=rf"(Local)?UserError: .*{log} cannot be written: No space") as said:
            run_ranks(tiny_runs.train, 2, _arguments(run, tiny_data, **settings, **{"log.every": 3}))
        assert "OSError" not in str(said.value)
        assert not list((run / "checkpoints").glob("*.tmp"))
    finally:
        subprocess.run(["umount", str(full)], check=True)


def test_tensorboard_on_a_full_disk_is_one_line(tiny_data: Path, tmp_path: Path) -> None:
    """Nothing of its writing thread, at the start or later; a run goes on without it."""
    run = tmp_path / "run"
    (run / "tensorboard").mkdir(parents=True)
    settings = {"log.to": ["tensorboard"], "log.every": 1}
    arguments = _arguments(run, tiny_data, **settings)
    said = tmp_path / "said"
    code = run_ranks(tiny_runs.train_tensorboard_full, 1, arguments, said)
    assert code == [0] and _newest(run) == 5
    assert said.read_text().count("tensorboard cannot be written: No space left on device") == 1
    assert "Traceback" not in said.read_text()


@pytest.mark.parametrize("saved", [2, 0])
def test_what_is_done_again_stands_once_in_tensorboard_too(saved: int, tiny_data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    settings = {"log.to": ["tensorboard"], "checkpoint.every": 2, "log.every": 1}
    assert run_ranks(tiny_runs.train, 1, _arguments(run, tiny_data, **settings, **{"train.stop_at": 4})) == [0]
    for step in range(saved + 1, 5):  # as if the run had died before they were saved
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    assert run_ranks(tiny_runs.train, 1, _arguments(run, tiny_data, **settings)) == [0]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [point.step for point in events.Scalars("train/loss")] == [record["tokens"] for record in logged]
    assert [record["step"] for record in logged] == [1, 2, 3, 4, 5]


def test_tensorboard_has_what_the_log_has_when_a_run_is_killed(tiny_data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    settings = {"log.to": ["tensorboard"], "checkpoint.every": 2, "log.every": 1}
    arguments = _arguments(run, tiny_data, **settings)
    with pytest.raises(AssertionError, match="died without a result"):
        run_ranks(tiny_runs.train_recorded, 1, arguments, tmp_path / "records", 3)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [point.step for point in events.Scalars("train/loss")] == [record["tokens"] for record in logged]
    assert [record["step"] for record in logged] == [1, 2, 3]


def test_a_checkpoint_is_on_the_disk_after_its_steps_logs(tiny_data: Path, tmp_path: Path) -> None:
    """A node that loses its power has the records of the steps that are not done again."""
    arguments = _arguments(tmp_path / "run", tiny_data, **{"evaluate.every": 2, "evaluate.samples": 2})
    assert run_ranks(tiny_runs.train_traced, 1, [*arguments, "checkpoint.every=5"], tmp_path / "calls") == [0]
    calls = (tmp_path / "calls").read_text().splitlines()
    renamed = calls.index("rename step-00000005.tmp")
    assert {"fsync log.jsonl", "fsync validation.jsonl", "fsync hashes.json"} <= set(calls[:renamed])


def test_two_jobs_on_one_run(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lock = RunLock(run)
    assert lock.acquire() is None
    with pytest.raises(AssertionError, match=rf"UserError: run folder .* is in use by process {os.getpid()} on "):
        run_ranks(tiny_runs.train, 2, _arguments(run, tiny_data))
    assert not complete(run / "checkpoints") and not (run / "config.yaml").exists()
    lock.release()
    assert set(run_ranks(tiny_runs.train, 2, _arguments(run, tiny_data))) == {0}
    assert json.loads((run / "lock").read_text())["pid"] != os.getpid()


def test_a_store_that_has_gone_was_the_first_to_find_out() -> None:
    """Rank 0 has waited, said so and left, while the others still ask who has not: nobody else has to say it."""
    assert run_ranks(tiny_runs.unheard_after_rank0, 2) == [None, []]


@pytest.mark.parametrize("layout", [{"parallel.tp": 2}, {"parallel.zero_stage": 3}], ids=str)
def test_every_group_has_the_time_out_that_was_set(layout: dict[str, Any], tiny_data: Path, tmp_path: Path) -> None:
    settings = {"train.steps": 1, "parallel.timeout_minutes": 2.5, **layout}
    for made in run_ranks(group_ranks.timeouts, 2, tiny_runs.overrides(tmp_path / "run", tiny_data, settings)):
        assert len(made) > 10 and {timeout for _, timeout in made} == {2.5}, made


@pytest.mark.parametrize("where", ["store", "groups"])
@pytest.mark.parametrize("victim", [0, 1])
def test_ranks_that_do_not_come_together_are_a_lost_node(
    victim: int, where: str, tiny_data: Path, tmp_path: Path
) -> None:
    """The other one leaves after the time-out that was set, and the run folder says why to the launcher."""
    (tmp_path / "run").mkdir()  # as the launcher does
    (tmp_path / "empty.yaml").write_text("{}\n")
    arguments = tiny_runs.overrides(tmp_path / "run", tiny_data, {"parallel.timeout_minutes": 0.05})
    arguments.insert(0, str(tmp_path / "empty.yaml"))
    said = tmp_path / "said"
    codes, _ = end_ranks(group_ranks.stopped_before_joining, 2, arguments, victim, where, said, enough=1)
    assert codes == ([87, None] if victim else [None, 87])
    (line,) = (line for line in said.read_text().splitlines() if "megatron-bit: error" in line)
    assert (tmp_path / "run" / "RANK_LOST").read_text() == line.partition(": error: ")[2].partition(";")[0] + "\n"
