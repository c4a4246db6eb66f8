#!/usr/bin/env python3
"""Checks and times on a GPU, without a network, what CI cannot: one JSON file and one Markdown table, in nine minutes.

    python scripts/gpu_check.py --out gpu                        everything, on the GPU of this machine
    python scripts/gpu_check.py --out gpu --only attention fp8   some of it
    python scripts/gpu_check.py --out gpu --only kernels         forms of our operations; writes gpu/measured.json too
    python scripts/gpu_check.py --out gpu --bundle .gpu          first install what gpu_bundle.py made
    python scripts/gpu_check.py --out cpu --device cpu           the same program at small sizes, where there is no GPU

Each check runs in a process of its own with a time limit, so that one which crashes or hangs leaves the others alone.
What could not be done is a row that says why. The exit code is 1 if a check found a wrong result, 2 if the bundle
cannot be used.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from install_bundle import PREFIX, Installed, checkout, install, python_path

MINUTES = 9.0
CHECKS = {  # name: seconds it may take
    "environment": 60,
    "engine": 120,
    "attention": 90,
    "fp8": 90,
    "training": 120,
    "waits": 60,
    "layers": 60,
    "kernels": 240,
    "profile": 90,
    "bench_125m": 150,
    "bench_fp8": 180,
    "bench_generate": 90,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.json, gpu_check.md and .log")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=tuple(CHECKS), default=tuple(CHECKS), metavar="CHECK")
    parser.add_argument("--bundle", type=Path, help="folder that gpu_bundle.py made; is installed first, for this call")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="what does not fit any more is left out")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "gpu_check.log"
    log.write_text("")
    results: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv), "checks": {}}
    with tempfile.TemporaryDirectory(prefix=PREFIX) as site:
        installed = install(options.bundle, Path(site)) if options.bundle else Installed()
        if installed.steps:
            results["checks"]["bundle"] = {"state": "ok", "rows": installed.steps}
        for name in options.only:
            left = deadline - time.monotonic()
            check = _run(name, options.device, log, min(CHECKS[name], left), installed.paths)
            results["checks"][name] = check
            (options.out / "gpu_check.json").write_text(json.dumps(results, indent=1))
            (options.out / "gpu_check.md").write_text(table(results))
            print(f"{name}: {_summary(check)}", flush=True)
    print(f"wrote gpu_check.json, gpu_check.md and gpu_check.log in {options.out}")
    return int(any(check["state"] == "wrong" for check in results["checks"].values()))


def _run(name: str, device: str, log: Path, seconds: float, paths: list[str]) -> dict[str, Any]:
    """One check in its own process: {"state": ok | wrong | failed | left out, "seconds", ...}."""
    if seconds < 10:
        return {"state": "left out", "why": "no time left"}
    environment = {**os.environ, "PYTHONPATH": python_path([*checkout(), *paths])}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("ab") as file:
        result = Path(folder) / "result.json"
        words = [sys.executable, "-m", "megatron_bit.bench.on_device", name, device, str(result)]
        file.write(f"== {name}\n".encode())
        file.flush()
        try:
            code = subprocess.run(
                words, stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return {"state": "failed", "why": f"longer than {seconds:.0f} s; see {log.name}", "seconds": round(seconds)}
        measured = result.with_name("measured.json")  # of the check `kernels`
        if measured.exists():
            shutil.copy(measured, log.with_name(measured.name))
        found: dict[str, Any] = {"state": "failed", "why": f"exit code {code}; see {log.name}"}
        if result.exists():
            found = json.loads(result.read_text())
    return {**found, "seconds": round(time.monotonic() - begin, 1)}


def _summary(check: dict[str, Any]) -> str:
    why = f", {check['why']}" if "why" in check else ""
    return f"{check['state']}{why} ({len(check.get('rows', []))} rows, {check.get('seconds', 0)} s)"


def table(results: dict[str, Any]) -> str:
    """All rows, by check."""
    lines = [f"# gpu_check, {results['date']}", "", f"`{results['command']}`"]
    for name, check in results["checks"].items():
        lines += ["", f"## {name}: {_summary(check)}", ""]
        rows = check.get("rows", [])
        if rows:
            heads = list(dict.fromkeys(key for row in rows for key in row))
            lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
            lines += [f"| {' | '.join(_cell(row.get(head, '')) for head in heads)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


if __name__ == "__main__":
    sys.exit(main())
