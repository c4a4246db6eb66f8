"""What an installation makes importable: four packages, and never a package named `kernels`."""

import importlib.util
import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("megatron_bit", "mbit_kernels", "mbit_launcher", "mbit_data")


def python(code: str, cwd: Path) -> str:
    """Run code in a fresh interpreter with cwd on its path, as `python -c` does (no PYTHONPATH, no safe path)."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, check=False, capture_output=True, text=True, env={"PATH": ""}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_kernels_is_nobody_elsewhere(tmp_path):
    """A top-level `kernels` of ours would be taken by transformers for Hugging Face's package."""
    assert python("import importlib.util; print(importlib.util.find_spec('kernels'))", tmp_path) == "None"
    names = "('launcher', 'data_prep', 'tests', 'slurm')"
    assert python(f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])", tmp_path) == "[]"


def test_a_real_kernels_package_wins_even_in_the_repository(tmp_path):
    """There the folder kernels/ is a namespace portion at best, which any regular package on the path beats."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("WHO = 'hugging face'")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "import importlib.util as u, kernels\n"
        "print(kernels.WHO, kernels.__file__, u.find_spec('kernels.mbit_kernels'))"
    )
    assert python(code, ROOT) == f"hugging face {package / '__init__.py'} None"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_four_packages_import_from_anywhere(tmp_path):
    code = f"import importlib\nfor n in {PACKAGES}: print(importlib.import_module(n).__file__)"
    files = python(code, tmp_path).splitlines()
    assert [Path(f).parent.name for f in files] == list(PACKAGES)


def test_presets_come_with_the_package(tmp_path):
    code = "from megatron_bit.config import preset_names; print(*preset_names())"
    assert python(code, tmp_path) == "125m 1b 8b bitlm laptop"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    (found,) = folder.glob("*.whl")
    return found


def test_wheel(wheel: Path) -> None:
    """Exactly the four packages at the top, with the presets, and no tests."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    for name in ("125m", "1b", "8b", "laptop"):
        assert f"megatron_bit/presets/{name}.yaml" in names
    assert "mbit_launcher/job.sh" in names
    shipped = {name.removeprefix("mbit_launcher/slurm_files/") for name in names if "/slurm_files/" in name}
    assert shipped == {p.relative_to(ROOT / "slurm").as_posix() for p in (ROOT / "slurm").rglob("*") if p.is_file()}
    sources = {p.relative_to(ROOT / "megatron_bit").as_posix() for p in (ROOT / "megatron_bit").rglob("*.py")}
    assert {f"megatron_bit/{s}" for s in sources} <= set(names)
    (metadata,) = [n for n in names if n.endswith("entry_points.txt")]
    assert "megatron-bit = megatron_bit.cli:main" in zipfile.ZipFile(wheel).read(metadata).decode()


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has our dependencies and nothing of this checkout."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=60)
    here = environment / "bin" / "python"
    install = ["-m", "pip", "--python", str(here), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, *install], check=True, timeout=120)
    (site,) = environment.glob("lib/python*/site-packages")
    # a path alone: what its .pth files say, such as where this checkout lies, is not read
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    where = subprocess.run(
        [here, "-c", "import megatron_bit; print(megatron_bit.__file__)"], cwd=tmp_path, capture_output=True, text=True
    )
    assert Path(where.stdout.strip()).is_relative_to(environment), where.stderr
    profiles = [environment / "bin" / "megatron-bit", "cluster", "profiles", "--out", "profiles"]
    subprocess.run(profiles, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert (tmp_path / "profiles" / "cpu.yaml").read_text() == (ROOT / "slurm" / "clusters" / "cpu.yaml").read_text()
    command = [environment / "bin" / "megatron-bit", "demo", "--quick", "--out", "demo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "== What changed" in done.stdout and (tmp_path / "demo" / "run" / "FINISHED").exists()
    log = [json.loads(line) for line in (tmp_path / "demo" / "run" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 20 and log[-1]["loss"] < log[0]["loss"]
