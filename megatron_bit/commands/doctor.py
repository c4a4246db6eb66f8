"""`megatron-bit doctor`: what this machine has, what is missing, what that costs and how to get it.

Also `python -m megatron_bit.commands.doctor`, which needs Python alone. Versions come from package metadata; torch
is the only heavy import, for the devices.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from json import dumps
from typing import Any, Literal

Status = Literal["ok", "optional", "problem", "missing"]


@dataclass(frozen=True)
class Row:
    """One thing looked for. `missing` is required and not usable; `optional` is absent and can stay so."""

    what: str
    status: Status
    found: str
    note: str = ""


@dataclass(frozen=True)
class Package:
    """A required distribution, what it is imported as, and what is lost without it."""

    name: str
    module: str
    use: str
    pin: str = ""


PACKAGES = (
    Package("megatron-core", "megatron.core", "no groups, tensor-parallel layers or schedules", "0.16.1"),
    Package("deepspeed", "deepspeed", "no optimizer (ZeRO)", "0.19.8"),
    Package("webdataset", "webdataset", "`bench data` has nothing to compare with"),
    Package("sentencepiece", "sentencepiece", "no tokenizer"),
    Package("tensorboard", "tensorboard", "no training curves"),
    Package("safetensors", "safetensors", "no checkpoints"),
    Package("transformers", "transformers", "no generation, no conversion"),
    Package("pydantic", "pydantic", "no configuration"),
    Package("rich", "rich", "no tables or progress lines"),
)
TE_RANGE = ((2, 9), (2, 12))  # what megatron-core 0.16.1 accepts: from, below
TORCH_RANGE = ((2, 11), (2, 14))
FP8_CAPABILITY = (8, 9)  # Ada, Hopper and later
INSTALL = "run `make test`, or `pip install -e .` in the checkout"
STYLES = {"ok": "green", "optional": "dim", "problem": "yellow", "missing": "bold red"}


def report() -> list[Row]:
    """Look at everything; never raises for something that is absent or broken."""
    torch, torch_row = _torch()
    checks: list[Callable[[], Row]] = [
        _python,
        _system,
        lambda: torch_row,
        lambda: _devices(torch),
        lambda: _nccl(torch),
        lambda: _gloo(torch),
        *(lambda package=package: _package(package) for package in PACKAGES),
        lambda: _transformer_engine(torch),
        _apex,
        lambda: _fp8(torch),
        lambda: _triton(torch),
        _slurm,
        _compiler,
        _disk,
    ]
    return [check() for check in checks]


def main(json: bool = False) -> int:
    """Print the table, or JSON; 1 if something required is missing, else 0."""
    rows = report()
    if json:
        print(dumps([asdict(row) for row in rows], indent=2))
    else:
        _print_table(rows)
    return int(any(row.status == "missing" for row in rows))


def _print_table(rows: list[Row]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:  # one of the things that may be missing
        for row in rows:
            print(f"{row.what}: {row.status}: {row.found}{'. ' if row.note else ''}{row.note}")
        return
    table = Table(caption="ok | optional: can stay so | problem: look at it | missing: has to be there")
    for title in ("what", "status", "found", "costs / how to get it"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(row.what, Text(row.status, STYLES[row.status]), Text(row.found), Text(row.note))
    Console().print(table)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _findable(module: str) -> bool:
    """Whether `import module` finds something; imports at most the parent package."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _numbers(version: str) -> tuple[int, int]:
    major, minor = (*re.findall(r"\d+", version), "0", "0")[:2]
    return int(major), int(minor)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _has_cuda(torch: Any) -> bool:
    return torch is not None and torch.cuda.is_available()


def _python() -> Row:
    found = f"{platform.python_version()} ({sys.executable})"
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return Row("Python", "ok", found)
    return Row("Python", "problem", found, "Python 3.11 and 3.12 are tested; make a venv with one of them")


def _system() -> Row:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Row("System", "ok", f"{name}, {platform.machine()}, {cores} cores, {memory:.0f} GiB memory")


def _torch() -> tuple[Any, Row]:
    version = _version("torch")
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken installation raises OSError, RuntimeError and others
        if version is None:
            return None, Row("PyTorch", "missing", "not installed", f"nothing runs; {INSTALL}")
        note = f"nothing runs; reinstall torch ({_one_line(error)})"
        return None, Row("PyTorch", "missing", f"{version}, cannot be imported", note)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    found = f"{torch.__version__} ({build})"
    low, high = TORCH_RANGE
    if not low <= _numbers(torch.__version__) < high:
        note = f"tested with >= {low[0]}.{low[1]}, < {high[0]}.{high[1]}; {INSTALL}"
        return torch, Row("PyTorch", "problem", found, note)
    return torch, Row("PyTorch", "ok", found)


def _devices(torch: Any) -> Row:
    if _has_cuda(torch):
        cards: dict[str, int] = {}
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            card = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
            cards[card] = cards.get(card, 0) + 1
        return Row("Devices", "ok", "; ".join(f"{count} x {card}" for card, count in cards.items()))
    if shutil.which("nvidia-smi") or os.path.exists("/dev/nvidia0"):
        note = "the GPU is not used; install torch's CUDA build (pytorch.org); check nvidia-smi"
        return Row("Devices", "problem", "a GPU that torch cannot use", note)
    note = "everything runs, under gloo; fit for small models and tests only"
    return Row("Devices", "optional", "none: CPU", note)


def _nccl(torch: Any) -> Row:
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_nccl_available():
        try:
            return Row("NCCL", "ok", ".".join(str(part) for part in torch.cuda.nccl.version()))
        except Exception as error:
            return Row("NCCL", "problem", _one_line(error), "no work on several GPUs; reinstall torch")
    if _has_cuda(torch):
        note = "several GPUs cannot work together; install torch's Linux CUDA build, which brings it"
        return Row("NCCL", "problem", "not in this build of torch", note)
    return Row("NCCL", "optional", "not in this build of torch", "for GPUs; comes with torch's CUDA build")


def _gloo(torch: Any) -> Row:
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_gloo_available():
        return Row("gloo", "ok", "in torch")
    note = "no runs on CPU, and no tests of several ranks; install an official build of torch"
    return Row("gloo", "problem" if _has_cuda(torch) else "missing", "not available", note)


def _package(package: Package) -> Row:
    version = _version(package.name)
    lost = f"{package.use}; {INSTALL}"
    if version is None:
        return Row(package.name, "missing", "not installed", lost)
    if not _findable(package.module):
        return Row(package.name, "missing", f"{version}, but `import {package.module}` finds nothing", lost)
    if package.pin and version != package.pin:
        note = f"parity is tested with {package.pin} only: pip install {package.name}=={package.pin}"
        return Row(package.name, "problem", version, note)
    return Row(package.name, "ok", version)


def _transformer_engine(torch: Any) -> Row:
    what = "Transformer Engine"
    version = _version("transformer-engine") or _version("transformer-engine-torch")
    if version is None:
        note = "its FP8 layers on Hopper and later; pip install -e '.[gpu]' there (compiles: needs nvcc)"
        return Row(what, "optional", "not installed", note)
    if not _has_cuda(torch):
        return Row(what, "optional", f"{version}, not tried", "it works on a GPU only; it costs nothing here")
    low, high = TE_RANGE
    if not low <= _numbers(version) < high:
        note = "megatron-core 0.16.1 takes >= 2.9, < 2.12: pip install -e '.[gpu]'"
        return Row(what, "problem", version, note)
    try:  # after torch, whose libraries it needs; the meta package alone raises RuntimeError, not ImportError
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        note = f"no FP8 layers; pip install -e '.[gpu]', or uninstall transformer-engine ({_one_line(error)})"
        return Row(what, "problem", f"{version}, cannot be imported", note)
    return Row(what, "ok", version)


def _apex() -> Row:
    if _findable("amp_C"):  # by symbol: PyPI's `apex` is another package
        return Row("NVIDIA apex", "ok", "amp_C")
    note = "nothing to do: torch and Transformer Engine replace it (PyPI's `apex` is an unrelated package)"
    return Row("NVIDIA apex", "optional", "no amp_C", note)


def _fp8(torch: Any) -> Row:
    if not _has_cuda(torch):
        note = "training is bf16 or fp32 (or fp8_emulated, slow); FP8 needs compute capability 8.9"
        return Row("FP8", "optional", "no GPU", note)
    lowest = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    found = f"compute capability {lowest[0]}.{lowest[1]}"
    if lowest >= FP8_CAPABILITY:
        return _fp8_recipes(found)
    return Row("FP8", "optional", found, "no FP8 units (they come with 8.9: Ada, Hopper); bf16 is used")


def _fp8_recipes(found: str) -> Row:
    try:
        from megatron_bit.precision import te
    except ImportError as error:
        return Row("FP8", "optional", found, f"{error}; {INSTALL}")
    offered = te.offered()
    able = [f"fp8.recipe={name}" for name, reason in offered.items() if not reason]
    if able:
        return Row("FP8", "ok", f"{found}: {', '.join(able)}")
    return Row("FP8", "optional", found, f"{offered['current']}; bf16 is used")


def _triton(torch: Any) -> Row:
    version = _version("triton")
    if version is not None and _findable("triton"):
        return Row("Triton", "ok", version)
    if _has_cuda(torch):
        note = "no GPU kernels of ours, no torch.compile; pip install triton"
        return Row("Triton", "problem", "not installed", note)
    return Row("Triton", "optional", "not installed", "GPU kernels only; comes with torch's CUDA build")


def _slurm() -> Row:
    sbatch = shutil.which("sbatch")
    if sbatch is None or shutil.which("srun") is None:
        note = "runs on this machine only; on a cluster call this on a login node"
        return Row("SLURM", "optional", "no sbatch and srun on PATH", note)
    job = os.environ.get("SLURM_JOB_ID")
    inside = f", inside job {job}" if job else ""
    try:
        command = [sbatch, "--version"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=3, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        stderr = getattr(error, "stderr", None) or ""  # bytes after a time-out
        text = stderr if isinstance(stderr, str) else stderr.decode(errors="replace")
        said = text.strip().splitlines()
        note = f"no jobs from here: is there a slurm.conf? ({said[-1] if said else _one_line(error)})"
        return Row("SLURM", "problem", f"{sbatch} does not work{inside}", note)
    return Row("SLURM", "ok", out.strip() + inside)


def _compiler() -> Row:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return Row("C++ compiler", "ok", path)
    note = "needed to build extensions only (Transformer Engine, torch.compile on CPU): apt install g++"
    return Row("C++ compiler", "optional", "none on PATH", note)


def _disk() -> Row:
    free = shutil.disk_usage(".").free / 2**30
    found = f"{free:.1f} GiB free in {os.getcwd()}"
    if free < 2:
        note = "a checkpoint takes about 12 bytes a parameter; set `run` to a folder with space"
        return Row("Disk", "problem", found, note)
    return Row("Disk", "ok", found)


if __name__ == "__main__":
    sys.exit(main(json="--json" in sys.argv[1:]))
