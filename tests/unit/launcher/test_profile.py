"""Cluster profiles, and the script made from one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from mbit_launcher import profiles
from mbit_launcher.profile import ClusterProfile, load_profile, split_overrides
from mbit_launcher.render import render
from mbit_launcher.submission import Submission

from megatron_bit.errors import UserError

EXAMPLES = sorted((Path(__file__).parents[3] / "slurm" / "clusters").glob("*.yaml"))


def _profile(tmp_path: Path, text: str, *overrides: str) -> ClusterProfile:
    (tmp_path / "cluster.yaml").write_text(text)
    return load_profile(tmp_path / "cluster.yaml", overrides)


def test_values_are_what_stands_there(tmp_path: Path) -> None:
    text = "time: 1:30:00\nmemory: 0\naccount:\nranks_per_node: 2\nenvironment: {NCCL_IB_TIMEOUT: 22, EMPTY: }\n"
    profile = _profile(tmp_path, text, "nodes=3", "preflight.min_free_gib=0.5", "exclusive=true", "modules=[a, b]")
    assert (profile.time, profile.memory, profile.account, profile.world_size) == ("1:30:00", "0", None, 6)
    assert profile.environment == {"NCCL_IB_TIMEOUT": "22", "EMPTY": ""}
    assert profile.preflight.min_free_gib == 0.5 and profile.exclusive and profile.modules == ("a", "b")


BAD = {
    "nodez: 2": ("cluster.nodez", "did you mean cluster.nodes?"),
    "nodes: two": ("cluster.nodes = 'two'", "integer"),
    "nodes: 1\nnodes: 2": ("key 'nodes' is given twice",),
    "time: tomorrow": ("'tomorrow'", "D-H:M:S"),
    "gpus_per_node: 8\nranks_per_node: 2": ("every GPU has one rank",),
    "gpus_per_node: 0": ("ranks_per_node has to be set",),
    "ranks_per_node: 2\nenvironment: {'A B': x}": ("'A B'",),
    "ranks_per_node: 2\nsbatch: [x]": ("'x'", "--constraint"),
    "- a": ("has to be a mapping",),
}


@pytest.mark.parametrize("text", BAD)
def test_mistakes_are_said_in_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError) as error:
        _profile(tmp_path, text if "per_node" in text or text[0] == "-" else f"{text}\nranks_per_node: 2")
    assert all(part in str(error.value) for part in BAD[text]), error.value
    with pytest.raises(UserError, match=r"`megatron-bit cluster profiles` has examples"):
        load_profile(tmp_path / "none.yaml")


def test_overrides_of_the_profile_are_told_apart() -> None:
    assert split_overrides(["train.steps=3", "cluster.nodes=2"]) == (("train.steps=3",), ("nodes=2",))


def _script(profile: ClusterProfile, run: Path, **more: object) -> str:
    submission = Submission(run / "slurm" / "0000")
    return render(profile, [submission], submission.logs / "job-%j.log", (), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_examples_make_scripts(path: Path, tmp_path: Path) -> None:
    script = _script(load_profile(path), tmp_path)
    (tmp_path / "job.sbatch").write_text(script)
    subprocess.run(["bash", "-n", tmp_path / "job.sbatch"], check=True)
    header = script.split("\n\n")[0].splitlines()
    assert header[0] == "#!/bin/bash" and all(line.startswith("#") for line in header)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


def test_every_key_of_a_profile_gets_into_the_script(tmp_path: Path) -> None:
    text = """
partition: p1
account: a1
qos: q1
nodes: 3
time: 5:00
gpus_per_node: 4
cpus_per_node: 32
memory: 100G
exclusive: true
exclude: n[7-8]
switches: 1@5:00
segment: 2
sbatch: [--constraint=h100]
srun: [--cpu-bind=none]
container: {image: /i/a b.sqsh, mounts: ["/data:/data", "/runs:/runs"], options: [--container-writable]}
modules: [cuda/12.8]
environment: {NCCL_IB_HCA: mlx5}
python: /opt/python
save_seconds: 200
cordon: /shared/cordon
"""
    script = _script(_profile(tmp_path, text), tmp_path / "run")
    header = """--partition=p1 --account=a1 --qos=q1 --nodes=3 --time=5:00 --gpus-per-node=4 --cpus-per-task=32
        --mem=100G --exclusive --exclude=n[7-8] --switches=1@5:00 --segment=2 --constraint=h100
        --signal=B:USR1@200 --requeue"""
    settings = (
        "srun_options=(--cpu-bind=none)",
        "ranks_per_node=4",
        "container=('--container-image=/i/a b.sqsh' --container-mounts=/data:/data,/runs:/runs --container-writable)",
        "module load cuda/12.8 || exit 1",
        "export NCCL_IB_HCA=mlx5",
        "python=/opt/python",
        "cordon=/shared/cordon",
        "last_call=160  # seconds that a save may take after SLURM's signal",
    )
    for line in (*(f"#SBATCH {word}" for word in header.split()), *settings):
        assert f"\n{line}\n" in script, line
    assert "#SBATCH --no-requeue\n" in _script(ClusterProfile(ranks_per_node=1), tmp_path, requeue=False)


def test_what_a_user_writes_cannot_break_out(tmp_path: Path) -> None:
    """bash reads back what was put in, and runs nothing of it."""
    odd = "a'b\"c $(touch hacked) `touch hacked` ; touch hacked"
    profile = ClusterProfile(ranks_per_node=1, environment={"ODD": odd}, python=odd, cordon=odd, srun=(f"--x={odd}",))
    run = tmp_path / odd.replace("/", "")
    settings = _script(profile, run).partition("# ------")[0]
    shown = 'printf "%s\\0" "$ODD" "$python" "$cordon" "$submission" "${srun_options[@]}"'
    done = subprocess.run(["bash", "-c", settings + shown], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == [odd, odd, odd, str(run / "slurm" / "0000"), f"--x={odd}"]
    assert not list(tmp_path.iterdir())
    for bad in ("a\\b", "a\nb"):
        with pytest.raises(UserError, match="backslash or a line break"):
            _script(profile, tmp_path / bad)


def test_an_array_has_a_folder_a_task(tmp_path: Path) -> None:
    made = [Submission(tmp_path / name / "slurm" / "0000") for name in ("a", "b c")]
    script = render(ClusterProfile(ranks_per_node=1), made, made[0].logs / "job-%A_%a.log", ("n3",))
    assert "#SBATCH --array=0-1\n" in script and "#SBATCH --exclude=n3\n" in script
    line = next(line for line in script.splitlines() if line.startswith("submissions="))
    show = f'{line}; printf "%s\\n" "${{submissions[@]}}"'
    done = subprocess.run(["bash", "-c", show], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(s.folder) for s in made]


@pytest.mark.parametrize("value", ["gpu\\ntouch /tmp/x", "a\\rb", "\\e[2J", "a\\u2028b", "\\u202Eabc", "\\0"])
@pytest.mark.parametrize(
    "key", ["partition", "account", "exclude", "memory", "sbatch", "environment", "modules", "container"]
)
def test_a_value_is_one_line_of_text(key: str, value: str, tmp_path: Path) -> None:
    """A line break would become a line of the batch script, which bash runs."""
    written = {
        "sbatch": f'["--comment={value}"]', "environment": f'{{A: "{value}"}}', "modules": f'["{value}"]',
        "container": f'{{image: "{value}"}}',
    }.get(key, f'"{value}"')  # fmt: skip
    path = tmp_path / "p.yaml"
    path.write_text(f"ranks_per_node: 1\n{key}: {written}\n")
    with pytest.raises(UserError, match=r"control character|special characters are not allowed") as said:
        load_profile(path)
    assert "\n" not in str(said.value)


def test_the_shipped_profiles_are_copied_and_never_over_changed_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profiles.main(None) == 0
    listed = capsys.readouterr().out
    for _ in range(2):  # the same again changes nothing
        assert profiles.main(tmp_path / "mine") == 0
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    assert names == {"cpu.yaml", "a100-modules.yaml", "h100-pyxis.yaml", "prepare.sbatch"}
    assert all(name in listed for name in names)
    for name in names - {"prepare.sbatch"}:
        load_profile(tmp_path / "mine" / name)
    (tmp_path / "mine" / "cpu.yaml").write_text("nodes: 1\n")
    with pytest.raises(UserError, match=r"mine/cpu.yaml is there, and is not the shipped one"):
        profiles.main(tmp_path / "mine")
    assert (tmp_path / "mine" / "cpu.yaml").read_text() == "nodes: 1\n"
