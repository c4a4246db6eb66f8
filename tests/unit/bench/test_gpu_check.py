"""scripts/gpu_check.py on a CPU: the same program, at the sizes and with the checks that are possible here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_bit.bench import on_device

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[3] / "scripts" / "gpu_check.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_a_cpu_can_do(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--out", str(tmp_path), "--only", "environment", "engine", "attention", "fp8", "waits"]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    assert {name: check["state"] for name, check in checks.items()} == dict.fromkeys(words[5:], "ok")
    assert [row["form"] for row in checks["attention"]["rows"]] == ["SDPA, dense mask", "FlexAttention"] * 3
    assert all(row["real"] == "no GPU" and row["right"] for row in checks["fp8"]["rows"])
    results = [row["result"] for row in checks["engine"]["rows"]]
    assert all(result == "passed" or result.startswith("skipped: ") for result in results) and results
    assert {path.name for path in tmp_path.iterdir()} == {f"gpu_check.{end}" for end in ("json", "md", "log")}
    text = (tmp_path / "gpu_check.md").read_text()
    assert "## waits: ok" in text and "| needs a GPU" in text


def test_every_check_is_there(script: ModuleType) -> None:
    assert list(script.CHECKS) == list(on_device.CHECKS)


def test_a_wrong_result_fails_and_a_crash_leaves_the_others_alone(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"attention": {"state": "wrong", "rows": [{"form": "a|b", "right": False}]}, "fp8": {"state": "ok"}}
    monkeypatch.setattr(script, "_run", lambda name, *_: found[name])
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), "--only", "attention", "fp8"])
    assert script.main() == 1
    assert "| a/b | False |" in (tmp_path / "gpu_check.md").read_text()


def test_time_limits(script: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "gpu_check.log"
    assert script._run("layers", "cpu", log, 5, [])["state"] == "left out"
    slow = script._run("bench_generate", "cpu", log, 10.0, [])
    assert slow["state"] in ("ok", "failed") and slow["seconds"] <= 11
    assert script._run("attention", "cuda", log, 60, [])["why"] == "torch sees no GPU"
    assert [line for line in log.read_text().splitlines() if line[:2] == "=="] == ["== bench_generate", "== attention"]


def test_the_table_of_kernels_comes_out(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check on a GPU leaves it beside its result, which is in a temporary folder."""

    def run(words: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        result = Path(words[-1])
        result.write_text('{"state": "ok", "rows": []}')
        result.with_name("measured.json").write_text('{"a GPU": {}}')
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(script.subprocess, "run", run)
    assert script._run("kernels", "cuda", tmp_path / "gpu_check.log", 60, [])["state"] == "ok"
    assert json.loads((tmp_path / "measured.json").read_text()) == {"a GPU": {}}
