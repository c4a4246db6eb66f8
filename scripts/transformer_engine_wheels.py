"""Transformer Engine's three wheels for one GPU architecture, made where there is no GPU and no CUDA compiler.

PyPI has the core library with code for seven architectures, and the torch extension as source only. Here the core keeps
one architecture, and the extension is compiled against this environment's Python and torch: C++ alone, in one
translation unit at -O1, since 28 of them at -O3 take half an hour on two cores. Needs g++, a network and 2.5 GB of
memory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from typing import Any

import fatbin

VERSION = "2.11.0"  # what megatron-core 0.16.1 takes (>= 2.9, < 2.12) and precision/te.py is written against
NEEDS = ("einops", "onnx", "onnxscript", "packaging", "pydantic")  # Requires-Dist of the extension, torch aside
_HEADERS = ("nvidia-cuda-crt", "nvidia-cuda-cccl")  # what torch's own CUDA wheels leave out of their headers


def make(out: Path, work: Path, architecture: int) -> None:
    """Puts the wheels into `out`; `work` is for about a gigabyte of temporary files. Architecture 0 is all of them."""
    environment = _environment(work)
    pip(
        "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", work, f"transformer-engine-cu13=={VERSION}"
    )
    pip("download", "--quiet", "--no-deps", "--dest", out, f"transformer-engine=={VERSION}")
    pip(
        "install", "--quiet", "--target", work / "tools", "wheel>=0.45"
    )  # its pack and unpack; the extension's setup.py
    core = next(work.glob("transformer_engine_cu13*.whl"))
    if architecture:
        _reduce(core, out, work, architecture, environment)
    else:
        shutil.move(core, out)
    _compile(out, work, environment)


def pip(*words: Any, **how: Any) -> None:
    """This environment's pip; exits with its message if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    if subprocess.run(command, check=False, **how).returncode:
        sys.exit(f"failed: {' '.join(command)}")


def _environment(work: Path) -> dict[str, str]:
    """For the extension's setup.py: this environment's CUDA headers, and an nvcc that it asks for no more than this."""
    import torch

    release = torch.version.cuda
    pip("install", "--quiet", "--no-deps", "--target", work / "cuda", *(f"{name}=={release}.*" for name in _HEADERS))
    nvcc = work / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(exist_ok=True)
    nvcc.write_text(f"#!/bin/sh\necho 'release {release}'\n")
    nvcc.chmod(0o755)
    here = Path(sysconfig.get_path("purelib")) / "nvidia"
    folders = [here / part / "include" for part in ("cu13", "cudnn", "nccl")]
    more = work / "cuda" / "nvidia" / "cu13" / "include"
    return {
        **os.environ,
        "PYTHONPATH": str(work / "tools"),
        "CUDA_HOME": str(work / "cuda"),
        "CPATH": os.pathsep.join(map(str, [*folders, more, more / "cccl"])),
        "NVTE_FRAMEWORK": "pytorch",
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE",  # not a wheel from GitHub
    }


def _reduce(wheel: Path, out: Path, work: Path, architecture: int, environment: dict[str, str]) -> None:
    """The core's wheel with one architecture's device code."""

    def tool(*words: str | Path) -> None:
        command = [sys.executable, "-m", "wheel", *words]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)

    tool("unpack", wheel, "--dest", work)
    folder = next(path for path in work.glob("transformer_engine_cu13-*") if path.is_dir())
    library = folder / "transformer_engine" / "wheel_lib" / "libtransformer_engine.so"
    before, after = fatbin.keep(library, work / library.name, architecture)
    (work / library.name).replace(library)
    packed = work / "packed"
    packed.mkdir()
    tool("pack", folder, "--dest-dir", packed)
    shutil.move(next(packed.iterdir()), out / wheel.name)  # `pack` names it cp310, as its metadata wrongly says
    print(
        f"transformer-engine-cu13: sm_{architecture} is {after / 2**20:.0f} of {before / 2**20:.0f} MiB of device code"
    )


def _compile(out: Path, work: Path, environment: dict[str, str]) -> None:
    """The torch extension's wheel."""
    name = f"transformer-engine-torch=={VERSION}"
    how = ["--quiet", "--no-deps", "--no-build-isolation"]
    pip("download", *how, "--no-binary=:all:", "--dest", work, name, env=environment)
    with tarfile.open(next(work.glob("transformer_engine_torch-*.tar.gz"))) as archive:
        archive.extractall(work, filter="data")
    folder = work / f"transformer_engine_torch-{VERSION}"
    _in_one_unit(folder / "csrc")
    flags = folder / "build_tools" / "pytorch.py"
    text = flags.read_text()
    if '"-O3"' not in text:
        sys.exit(f"{flags} has no -O3 to replace: is this transformer-engine-torch {VERSION}?")
    flags.write_text(text.replace('"-O3"', '"-O1"'))
    pip("wheel", *how, "--wheel-dir", out, folder, env=environment)


def _in_one_unit(sources: Path) -> None:
    files = sorted(sources.rglob("*.cpp"))
    for file in files:
        file.rename(file.with_suffix(".inc"))
    lines = [f'#include "{file.relative_to(sources).with_suffix(".inc")}"\n' for file in files]
    (sources / "all.cpp").write_text("".join(lines))
