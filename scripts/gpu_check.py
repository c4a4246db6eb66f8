#!/usr/bin/env python3
"""Checks and times on a GPU, without a network, what CI cannot: one JSON file and one Markdown table, in nine minutes.

    python scripts/gpu_check.py --out gpu                        everything, on the GPU of this machine
    python scripts/gpu_check.py --out gpu --only attention fp8   some of it
    python scripts/gpu_check.py --out gpu --wheels DIR           first install what is missing from wheels in DIR
    python scripts/gpu_check.py --out gpu --only kernels         forms of our operations; writes gpu/measured.json too
    python scripts/gpu_check.py --out cpu --device cpu           the same program at small sizes, where there is no GPU

Each check runs in a process of its own with a time limit, so that one which crashes or hangs leaves the others alone.
What could not be done is a row that says why. The exit code is 1 if a check found a wrong result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MINUTES = 9.0
CHECKS = {  # name: seconds it may take
    "environment": 30,
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
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.json, gpu_check.md and the logs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=tuple(CHECKS), default=tuple(CHECKS), metavar="CHECK")
    parser.add_argument("--wheels", type=Path, help="folder of wheels; pip installs from it what is missing")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="what does not fit any more is left out")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    if options.wheels is not None:
        _install(options.wheels)
    results: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv), "checks": {}}
    for name in options.only:
        left = deadline - time.monotonic()
        results["checks"][name] = _run(name, options.device, options.out, min(CHECKS[name], left))
        (options.out / "gpu_check.json").write_text(json.dumps(results, indent=1))
        print(f"{name}: {_summary(results['checks'][name])}", flush=True)
    (options.out / "gpu_check.md").write_text(table(results))
    print(f"wrote {options.out / 'gpu_check.json'} and {options.out / 'gpu_check.md'}")
    return int(any(check["state"] == "wrong" for check in results["checks"].values()))


def _install(wheels: Path) -> None:
    """Every wheel of the folder, without looking for what it needs: the machine's own torch has to stay."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        sys.exit(f"--wheels {wheels} has no .whl files")
    subprocess.run([sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", *files], check=True)


def _run(name: str, device: str, out: Path, seconds: float) -> dict[str, Any]:
    """One check in its own process: {"state": ok | wrong | failed | left out, "seconds", ...}."""
    if seconds < 10:
        return {"state": "left out", "why": "no time left"}
    log, result = out / f"{name}.log", out / f"{name}.json"
    result.unlink(missing_ok=True)
    root = Path(__file__).resolve().parents[1]
    paths = [str(root / part) for part in ("", "kernels", "data_prep", "launcher")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    words = [sys.executable, "-m", "megatron_bit.bench.on_device", name, device, str(result)]
    begin = time.monotonic()
    try:
        with open(log, "wb") as file:
            code = subprocess.run(
                words, stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=seconds, check=False
            ).returncode
    except subprocess.TimeoutExpired:
        return {"state": "failed", "why": f"longer than {seconds:.0f} s; see {log}", "seconds": round(seconds)}
    found: dict[str, Any] = {"state": "failed", "why": f"exit code {code}; see {log}"}
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
