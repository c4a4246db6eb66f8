"""Installs what gpu_bundle.py made, beside the machine's own packages, which stay as they are.

    export PYTHONPATH=$(python3 scripts/install_bundle.py .gpu)     # then: python3 -m megatron_bit ...

Everything goes into a temporary folder for PYTHONPATH, Transformer Engine into another: if it does not work here, all
else runs without it. Needs Python alone.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NoReturn

PREFIX = "megatron_bit_gpu_"
LIMIT_S = 150  # for each step
# a product in FP8, so that a driver that refuses the reduced library is found out here
_TRY = """
import torch, transformer_engine.pytorch as te
from transformer_engine.common.recipe import Float8CurrentScaling
print("Transformer Engine imports")
if torch.cuda.is_available():
    layer = te.Linear(256, 256, params_dtype=torch.bfloat16)
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with te.autocast(enabled=True, recipe=Float8CurrentScaling()):
        out = layer(x)
    out.sum().backward()
    exact = x.double() @ layer.weight.double().t() + layer.bias.double()
    apart = ((out.double() - exact).norm() / exact.norm()).item()
    assert apart < 0.1, f"its product in FP8 is {apart:.3g} from float64"
    print(f"Transformer Engine imports; its product in FP8 is {apart:.3g} from float64")
"""


@dataclass
class Installed:
    """What came of it: folders for PYTHONPATH, and a line for each step."""

    paths: list[str] = field(default_factory=list)
    steps: list[dict[str, str]] = field(default_factory=list)

    def note(self, step: str, result: str) -> None:
        self.steps.append({"step": step, "result": result})
        print(f"bundle: {step}: {result}", file=sys.stderr, flush=True)


def install(bundle: Path, site: Path) -> Installed:
    """Into folders in `site`. Exits with a line and code 2 if the base is for another Python or cannot be installed."""
    try:
        manifest = json.loads((bundle / "bundle.json").read_text())
    except (OSError, ValueError) as error:
        _refuse(f"--bundle {bundle} has no readable bundle.json ({error}); make it with scripts/gpu_bundle.py")
    here = "{}.{}".format(*platform.python_version_tuple())
    if here != manifest["python"]:
        _refuse(f"--bundle {bundle} is for Python {manifest['python']}, and this is {here}: make it with Python {here}")
    found = Installed()
    problem = _pip(bundle / "base", manifest["base"], site / "base", found)
    if problem:
        _refuse(f"--bundle {bundle}: {problem}")
    found.paths.append(str(site / "base"))
    _engine(bundle, manifest, site / "engine", found)
    return found


def _refuse(message: str) -> NoReturn:
    """As argparse: 1 would say that a check found a wrong result."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _engine(bundle: Path, manifest: dict[str, object], site: Path, found: Installed) -> None:
    wheels: Sequence[str] = manifest["engine"]  # type: ignore[assignment]
    without, torch = "checking without Transformer Engine", metadata.version("torch")
    if not wheels:
        found.note("engine", f"not in the bundle; {without}")
        return
    if torch != str(manifest["torch"]).split("+")[0] and torch != manifest["torch"]:
        found.note("engine", f"is for torch {manifest['torch']}, and this is {torch}; {without}")
        return
    problem = _pip(bundle / "engine", wheels, site, found)
    if problem:
        found.note("engine", f"{problem}; {without}")
        return
    words = [sys.executable, "-c", _TRY]
    environment = {"PYTHONPATH": python_path([str(site), *found.paths]), "NVTE_FRAMEWORK": "pytorch"}
    problem, said = _run(words, environment)
    if problem:
        found.note("engine", f"does not work here: {problem}; {without}")
        return
    found.paths.insert(0, str(site))
    found.note("engine", said)


def _pip(folder: Path, wheels: Sequence[str], site: Path, found: Installed) -> str:
    """What went wrong, or an empty string."""
    begin, absent = time.monotonic(), [name for name in wheels if not (folder / name).is_file()]
    if absent:
        return f"{folder / absent[0]} is not there: copy the bundle again"
    # not what they need: pip would look for it among the machine's own packages and not find it in --target
    how = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--quiet", "--disable-pip-version-check"]
    files = [str(folder / name) for name in wheels]
    problem, _ = _run([sys.executable, "-m", "pip", "install", *how, "--target", str(site), *files], {})
    if not problem:
        found.note(folder.name, f"{len(wheels)} wheels installed in {time.monotonic() - begin:.1f} s")
    return problem


def _run(words: Sequence[str], extra: dict[str, str]) -> tuple[str, str]:
    """(what went wrong, or nothing; the last line it said)."""
    try:
        done = subprocess.run(
            words, env={**os.environ, **extra}, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{' '.join(words)[:60]} took longer than {LIMIT_S} s", ""
    last = ((done.stderr if done.returncode else done.stdout).strip().splitlines() or [""])[-1]
    return (last or f"exit code {done.returncode}") if done.returncode else "", last


def python_path(folders: Sequence[str]) -> str:
    """PYTHONPATH with these first."""
    return os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])


def checkout() -> list[str]:
    """Where the packages of this checkout are."""
    root = Path(__file__).resolve().parents[1]
    return [str(root / part) for part in ("", "kernels", "data_prep", "launcher")]


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))  # stays: for the commands that follow
    print(python_path([*checkout(), *install(Path(sys.argv[1]), folder).paths]))
