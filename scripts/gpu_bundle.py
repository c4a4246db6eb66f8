#!/usr/bin/env python3
"""The folder of wheels that a GPU machine without a network lacks: made here, installed there by gpu_check.py.

    make PYTHON=python3.12 TORCH=torch==2.11.0 .venv/installed
    .venv/bin/python scripts/gpu_bundle.py --out .gpu --have have.txt

It holds what this environment has installed for the project, in these versions: what was tested is what is carried.
torch and what torch brings stay out, as do the packages named in --have (`pip list --format=freeze` over there, or
names alone). Transformer Engine comes with the code of one GPU architecture (transformer_engine_wheels.py).
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import transformer_engine_wheels as engine
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
CHECKS_NEED = ("pytest", "pytest-timeout", "hypothesis")  # the check that runs tests/gpu
MANIFEST = "bundle.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to make; of what is there, a bundle alone is replaced"
    )
    parser.add_argument("--have", type=Path, help="file of the packages that the GPU machine has, one a line")
    parser.add_argument("--architecture", type=int, default=90, help="of the GPU: 90 is Hopper; 0 for all, 171 MiB")
    parser.add_argument("--without-engine", action="store_true", help="no Transformer Engine")
    options = parser.parse_args()
    import torch

    if torch.version.cuda is None or not torch.version.cuda.startswith("13."):
        _refuse(f"this environment's torch {torch.__version__} is no CUDA 13 build, which the bundle is to run with")
    if options.out.exists() and not (options.out / MANIFEST).is_file() and any(options.out.iterdir()):
        _refuse(f"--out {options.out} holds other things than a bundle; give another folder, or empty it")
    folders = {"base": options.out / "base", "engine": options.out / "engine"}
    shutil.rmtree(options.out, ignore_errors=True)
    for folder in folders.values():
        folder.mkdir(parents=True)
    have = _names(options.have.read_text()) if options.have else set()
    roots = [*tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"], *CHECKS_NEED]
    _wheels(_lacking(roots, have), folders["base"])
    if not options.without_engine:
        extra = _lacking(engine.NEEDS, have | {_name(path.name.split("-")[0]) for path in folders["base"].iterdir()})
        _wheels(extra, folders["engine"])
        with tempfile.TemporaryDirectory() as work:
            engine.make(folders["engine"], Path(work), options.architecture)
    manifest = {
        "python": "{}.{}".format(*platform.python_version_tuple()), "torch": torch.__version__,
        **{part: sorted(path.name for path in folder.iterdir()) for part, folder in folders.items()},
    }  # fmt: skip
    (options.out / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for part, folder in folders.items():
        sizes = sorted(((path.stat().st_size, path.name) for path in folder.iterdir()), reverse=True)
        print(f"{part}: {len(sizes)} wheels, {_mib(sum(size for size, _ in sizes))}")
        for size, name in sizes:
            print(f"  {_mib(size):>9}  {name}")
    return 0


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _lacking(roots: list[str] | tuple[str, ...], have: set[str]) -> list[str]:
    """name==version of what `roots` need and is neither in `have` nor brought by torch; of this environment."""
    skip = have | set(_closure(["torch"], set()))
    return [f"{name}=={version}" for name, version in sorted(_closure(roots, skip).items())]


def _closure(roots: list[str] | tuple[str, ...], skip: set[str]) -> dict[str, str]:
    """Name: version of these requirements and of all that they require; nothing beyond what is in `skip`."""
    found: dict[str, str] = {}
    todo = [Requirement(root) for root in roots]
    while todo:
        needed = todo.pop()
        name = _name(needed.name)
        if name in skip or name in found:
            continue
        try:
            here = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            sys.exit(f"{name} is needed and not installed here: {sys.executable} -m pip install '{needed}'")
        found[name] = here.version
        for more in map(Requirement, here.requires or []):
            if more.marker is None or any(more.marker.evaluate({"extra": extra}) for extra in needed.extras or {""}):
                todo.append(more)
    return found


def _wheels(requirements: list[str], folder: Path) -> None:
    """Downloads wheels; what PyPI has as source only is built in this environment."""
    if requirements:
        print(f"fetching {len(requirements)} packages", flush=True)
        engine.pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, *requirements)


def _names(text: str) -> set[str]:
    return {_name(re.split(r"[=<>@ ]", line)[0]) for line in text.splitlines() if line.strip() and line[0] != "#"}


def _name(name: str) -> str:
    """As PyPI compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"failed: {error}")
