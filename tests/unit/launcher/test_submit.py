"""What `submit` checks before SLURM is asked, and what it leaves in the run folder."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import manifests
import pytest
import yaml
from mbit_launcher import slurm, status, submission
from mbit_launcher.profile import ClusterProfile
from mbit_launcher.submit import prepare, preview, submit, sweep, sweep_configs

from megatron_bit.config import Config, load_config
from megatron_bit.errors import UserError

PROFILE = ClusterProfile(nodes=2, ranks_per_node=2)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    manifests.bare(tmp_path / "data")
    return _with({}, tmp_path)


def _with(tree: dict[str, Any], root: Path) -> Config:
    pairs = [f"{key}={value}" for key, value in tree.items()]
    return load_config(None, [f"run={root / 'run'}", f"data.path={root / 'data'}", *pairs], "laptop")


def _programs(folder: Path, **scripts: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)


REFUSED = {
    "parallel.tp=3": r"2 nodes x 2 ranks: parallel.tp 3 x .* does not divide the world size 4",
    "data.path=none": r"data.path .*none has no manifest.json: `megatron-bit prepare",
    "data.path=": r"data.path is not set",
    "model.hidden_size=8192": r"a rank needs about [\d.]+ GiB, and cluster.gpu_memory_gib is 2: raise parallel.tp",
    "run=a\\b": r"backslash",
    "model.bits=11": r"^model.bits 11 is too small: the data has a vocabulary of 4096 tokens .*; set model.bits=12",
    "model.code=semantic": r"^model.code=semantic needs .*semantic-12.safetensors, which is not there; make it with",
    "model.code=raw": r"^model.code is raw, and .*data holds tokens of a vocabulary",
}


@pytest.mark.parametrize("change", REFUSED)
def test_refused_before_anything_is_written(change: str, config: Config, tmp_path: Path) -> None:
    key, _, value = change.partition("=")
    profile = ClusterProfile(nodes=2, gpus_per_node=2, gpu_memory_gib=2)
    with pytest.raises(UserError, match=REFUSED[change]):
        submit(_with({key: value}, tmp_path), profile)
    assert not (tmp_path / "run").exists()


def test_data_of_several_folders_and_behind_urls(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders become absolute, for the job runs elsewhere; what is remote stays as it is written."""
    monkeypatch.chdir(tmp_path)

    def made(*pairs: str) -> Config:
        return prepare(load_config(None, [f"run={tmp_path / 'run'}", "data.path=", *pairs], "laptop"), PROFILE)

    assert made("data.path=data").data.path == str(tmp_path / "data")
    assert made("data.path=https://host/data", "data.remote.cache=c").data.path == "https://host/data"
    assert made("data.path=https://host/data", "data.remote.cache=c").data.remote.cache == str(tmp_path / "c")
    both = made("data.sources=[{path: data, weight: 2}, {path: 's3://b/x', weight: 1}]").data.sources
    assert [(source.path, source.weight) for source in both] == [(str(tmp_path / "data"), 2), ("s3://b/x", 1)]
    with pytest.raises(UserError, match=r"data.sources .*none has no manifest.json"):
        made("data.sources=[{path: data}, {path: none}]")


def test_a_finished_run_is_not_submitted(config: Config, tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / f"step-{config.train.steps:08d}"
    step.mkdir(parents=True)
    (step / "COMMITTED").touch()
    (tmp_path / "run" / "FINISHED").touch()
    with pytest.raises(UserError, match=r"is finished: it has done train.steps 600; raise train.steps to go on"):
        preview([config], PROFILE, True)
    assert "#SBATCH" in preview([_with({"train.steps": 2000}, tmp_path)], PROFILE, True)


def test_without_slurm(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"sbatch of SLURM is not on PATH: .*`megatron-bit cluster up DIR`"):
        submit(config, PROFILE)
    (row,) = status.collect([tmp_path / "run"])
    assert row.state == "ended"


FAILED = "sbatch: error: Batch job submission failed:"
MESSAGES = {
    f"sbatch: error: AssocMaxSubmitJobLimit\n{FAILED} Job violates accounting/QOS policy (job submit limit, "
    "user's size and/or time limits)": "a limit of your account or QoS is reached",
    f"{FAILED} Invalid account or account/partition combination specified": "cluster.account",
    f"{FAILED} Invalid qos specification": "cluster.qos",
    f"{FAILED} Requested time limit is invalid (missing or exceeds some limit)": "lower cluster.time",
    "sbatch: fatal: Unable to process configuration file": "belongs to no cluster: set SLURM_CONF",
    "sbatch: error: job_submit.lua: buy more hours": "sbatch refused: job_submit.lua: buy more hours",
    "": "sbatch refused: exit code 1",
}  # fmt: skip


@pytest.mark.parametrize("said", MESSAGES)
def test_refusals_that_the_small_cluster_cannot_make(
    said: str, config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _programs(tmp_path / "bin", sbatch=f'echo "{said}" >&2; exit 1')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(slurm.Refused) as error:
        submit(config, PROFILE)
    assert MESSAGES[said] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_controller_that_does_not_answer(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _programs(tmp_path / "bin", sbatch="exec sleep 20")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "TIMEOUT_SECONDS", 0.5)
    with pytest.raises(UserError, match=r"sbatch has not answered for 0.5 s: .*`scontrol ping`"):
        submit(config, PROFILE)


def test_a_full_disk(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))

    monkeypatch.setattr(submission, "write_atomic", full)
    with pytest.raises(UserError, match=r"run folder .*run cannot be written: Disk quota exceeded \(.*\); make room"):
        submit(config, PROFILE)


def test_accounts_are_read_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: Config
) -> None:
    _programs(tmp_path / "bin", sbatch="echo 12", squeue="true", sacct='echo "12|CANCELLED by 1000"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    submit(config, PROFILE)
    (row,) = status.collect([tmp_path / "run"])
    assert (row.job, row.state, row.reason) == ("12", "cancelled", "SLURM: CANCELLED by 1000")
    _programs(tmp_path / "bin", sacct='echo "Slurm accounting storage is disabled" >&2; exit 1')
    assert status.collect([tmp_path / "run"])[0].state == "ended"


def test_what_is_left_in_the_run_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: Config) -> None:
    _programs(tmp_path / "bin", sbatch="echo 12", squeue="true")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    for number in range(2):  # nothing of the first is overwritten by the second
        submit(config.model_copy(update={"run": "run"}), PROFILE)
        folder = tmp_path / "run" / "slurm" / f"000{number}"
        names = {"job.sbatch", "config.yaml", "cluster.yaml", "code.json", "code.diff", "jobs.jsonl", "logs"}
        assert {p.name for p in folder.iterdir()} == names
        tree = yaml.safe_load((folder / "config.yaml").read_text())
        assert tree["run"] == str(tmp_path / "run") and tree["data"]["path"] == str(tmp_path / "data")
        assert submission.Submission(folder).profile() == PROFILE


def test_the_state_of_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    (root / "launcher" / "mbit_launcher").mkdir(parents=True)
    monkeypatch.setattr(submission, "__file__", str(root / "launcher" / "mbit_launcher" / "submission.py"))
    assert submission.code_state()[0]["commit"] is None
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    (root / "file").write_text("one\n")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    (root / "file").write_text("two\n")
    (root / "new").touch()
    state, diff = submission.code_state()
    assert len(state["commit"]) == 40 and state["changed"] and state["untracked"] == ["new"]
    assert "-one\n+two\n" in diff


def test_a_task_of_an_array_has_a_name_of_its_own(config: Config) -> None:
    """SLURM tells the number of the whole array, also to whom asks by the token: by it every task would be meant."""
    made = submission.create(config, PROFILE)
    made.ask_job("mbit-0123456789abcdef", made.logs, 2)
    assert [made.task_name("mbit-0123456789abcdef", job) for job in ("12", "12_2")] == ["12_2", "12_2"]
    made.ask_job("mbit-0123456789abcde0", made.logs)
    assert made.task_name("mbit-0123456789abcde0", "12") == "12"


def test_sweeps(config: Config, tmp_path: Path) -> None:
    base = (f"run={tmp_path / 'run'}", f"data.path={config.data.path}")
    made = sweep_configs(None, base, "laptop", ["optim.lr=1e-3,3e-4", "train.seed=1,2"])
    assert [(c.optim.lr, c.train.seed) for c in made] == [(1e-3, 1), (1e-3, 2), (3e-4, 1), (3e-4, 2)]
    assert Path(made[1].run) == tmp_path / "run" / "optim.lr=1e-3,train.seed=2"
    for bad, reason in (
        ("optim.lr", "is not key=value"),
        ("optim.lr=1,,2", "is not key=value"),
        ("train.seed=1,1", "twice"),
    ):
        with pytest.raises(UserError, match=reason):
            sweep_configs(None, base, "laptop", [bad])


def test_a_sweep_shares_no_mirror(config: Config, tmp_path: Path) -> None:
    base = (f"run={tmp_path / 'run'}", f"data.path={config.data.path}", "checkpoint.mirror=there")
    with pytest.raises(UserError, match=r"mirror '/.*there' would be of 2 runs"):
        sweep(sweep_configs(None, base, "laptop", ["train.seed=1,2"]), PROFILE)
    assert not (tmp_path / "run").exists()
