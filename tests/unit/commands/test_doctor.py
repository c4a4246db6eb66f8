"""The doctor: what it says when something is there, absent or broken."""

import importlib
import json
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_bit.commands import doctor
from megatron_bit.precision import te

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
SLURM = ("sbatch", "srun")


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: Patch) -> None:
    """SLURM's tools wait for a configuration that is not there; what this machine has is not to matter."""
    real = doctor.shutil.which
    monkeypatch.setattr(doctor.shutil, "which", lambda name: real(name) if name not in SLURM else None)


def rows() -> dict[str, doctor.Row]:
    return {row.what: row for row in doctor.report()}


def without(monkeypatch: Patch, *names: str) -> None:
    """As if these distributions were not installed."""
    real = metadata.version

    def version(name: str) -> str:
        if name in names:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)


def with_versions(monkeypatch: Patch, **versions: str) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name.replace("-", "_")) or real(name))


def with_gpus(monkeypatch: Patch, *capabilities: tuple[int, int]) -> None:
    def properties(index: int) -> Any:
        major, minor = capabilities[index]
        return SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30, major=major, minor=minor)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])


def without_gpus(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.os.path, "exists", lambda path: False)


def test_a_good_machine(monkeypatch: Patch) -> None:
    without_gpus(monkeypatch)
    found = rows()
    assert found["PyTorch"].status == "ok"
    assert torch.__version__ in found["PyTorch"].found
    assert found["Devices"] == doctor.Row("Devices", "optional", "none: CPU", found["Devices"].note)
    assert found["gloo"].status == "ok"
    assert found["megatron-core"] == doctor.Row("megatron-core", "ok", "0.16.1")
    assert found["deepspeed"] == doctor.Row("deepspeed", "ok", "0.19.8")
    assert not [row for row in found.values() if row.status == "missing"]
    assert all(row.note for row in found.values() if row.status != "ok")


def test_the_json_and_the_exit_code(monkeypatch: Patch, capsys: Capture) -> None:
    assert doctor.main(json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [set(row) for row in printed] == [{"what", "status", "found", "note"}] * len(printed)
    assert {row["status"] for row in printed} <= {"ok", "optional", "problem", "missing"}
    without(monkeypatch, "deepspeed")
    assert doctor.main(json=True) == 1
    missing = [row for row in json.loads(capsys.readouterr().out) if row["status"] == "missing"]
    assert [row["what"] for row in missing] == ["deepspeed"]
    assert "pip install -e ." in missing[0]["note"]


def test_the_table_names_everything(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert all(row.what in out for row in doctor.report())
    assert "costs / how to get it" in out


def test_no_rich_is_a_row_and_plain_lines(monkeypatch: Patch, capsys: Capture) -> None:
    without(monkeypatch, "rich")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert doctor.main() == 1
    assert "rich: missing: not installed. no tables" in capsys.readouterr().out


def test_no_torch(monkeypatch: Patch) -> None:
    without(monkeypatch, "torch")
    monkeypatch.setitem(sys.modules, "torch", None)
    found = rows()
    assert found["PyTorch"].status == found["gloo"].status == "missing"
    assert found["PyTorch"].found == "not installed"


def test_a_torch_that_does_not_load(monkeypatch: Patch) -> None:
    def broken(name: str) -> Any:
        raise OSError(f"{name}: libcudart.so.13:\ncannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    row = rows()["PyTorch"]
    assert (row.status, row.found) == ("missing", f"{metadata.version('torch')}, cannot be imported")
    assert "OSError: torch: libcudart.so.13: cannot open" in row.note


def test_a_package_with_metadata_but_no_module(monkeypatch: Patch) -> None:
    real = doctor._findable
    monkeypatch.setattr(doctor, "_findable", lambda module: module != "webdataset" and real(module))
    assert rows()["webdataset"].status == "missing"
    assert "import webdataset" in rows()["webdataset"].found


def test_a_version_beside_the_pin(monkeypatch: Patch) -> None:
    with_versions(monkeypatch, megatron_core="0.17.0")
    row = rows()["megatron-core"]
    assert (row.status, row.found) == ("problem", "0.17.0")
    assert "megatron-core==0.16.1" in row.note
    assert doctor.main(json=True) == 0


def test_gpus(monkeypatch: Patch) -> None:
    with_gpus(monkeypatch, (9, 0), (9, 0))
    found = rows()
    assert found["Devices"].found == "2 x NVIDIA H200, 140 GiB, compute capability 9.0"
    assert found["FP8"].status == "optional"
    assert "Transformer Engine cannot be imported" in found["FP8"].note
    monkeypatch.setattr(te, "offered", lambda: {"current": "", "delayed": "", "mxfp8": "needs 10.0"})
    assert rows()["FP8"].status == "ok"
    assert rows()["FP8"].found == "compute capability 9.0: fp8.recipe=current, fp8.recipe=delayed"


def test_fp8_is_as_good_as_the_weakest_gpu(monkeypatch: Patch) -> None:
    with_gpus(monkeypatch, (9, 0), (8, 0))
    assert rows()["FP8"].status == "optional"
    assert rows()["FP8"].found == "compute capability 8.0"


def test_a_gpu_that_torch_cannot_use(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="slurm 24.05\n"))
    assert rows()["Devices"].status == "problem"


def test_only_the_meta_package_of_transformer_engine(monkeypatch: Patch) -> None:
    with_versions(monkeypatch, transformer_engine="2.11.0")
    without_gpus(monkeypatch)
    assert rows()["Transformer Engine"].found == "2.11.0, not tried"

    real = importlib.import_module

    def meta_only(name: str) -> Any:
        if name.startswith("transformer_engine"):
            raise RuntimeError("Found empty `transformer-engine` meta package installed.")
        return real(name)

    with_gpus(monkeypatch, (9, 0))
    monkeypatch.setattr(importlib, "import_module", meta_only)
    row = rows()["Transformer Engine"]
    assert (row.status, row.found) == ("problem", "2.11.0, cannot be imported")
    assert "empty `transformer-engine` meta package" in row.note


def test_apex_is_known_by_its_symbol(monkeypatch: Patch) -> None:
    with_versions(monkeypatch, apex="0.9.10.dev0")
    assert rows()["NVIDIA apex"].status == "optional"
    monkeypatch.setattr(doctor, "_findable", lambda module: True)
    assert rows()["NVIDIA apex"].found == "amp_C"


def test_slurm(monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="slurm 24.05\n"))
    assert rows()["SLURM"] == doctor.Row("SLURM", "ok", "slurm 24.05, inside job 42")

    def hangs(*args: Any, **kwargs: Any) -> Any:
        raise subprocess.TimeoutExpired(args[0], kwargs["timeout"], stderr=b"no slurm.conf, retrying\n")

    monkeypatch.setattr(doctor.subprocess, "run", hangs)
    assert rows()["SLURM"].status == "problem"
    assert "(no slurm.conf, retrying)" in rows()["SLURM"].note


def test_a_full_disk(monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    assert rows()["Disk"].status == "problem"


def test_the_pins_are_those_of_the_package() -> None:
    requirements = metadata.requires("megatron-bit") or []
    for package in doctor.PACKAGES:
        line = next(r for r in requirements if r.split(";")[0].strip().startswith(package.name))
        assert not package.pin or f"=={package.pin}" in line
    (low, high), torch_line = doctor.TORCH_RANGE, next(r for r in requirements if r.startswith("torch"))
    assert f">={low[0]}.{low[1]}" in torch_line
    assert f"<{high[0]}.{high[1]}" in torch_line


def test_the_doctor_alone_imports_nothing_heavy() -> None:
    code = "import sys, megatron_bit.commands.doctor; print(sorted({'torch', 'rich', 'pydantic'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
