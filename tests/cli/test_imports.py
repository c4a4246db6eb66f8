"""A job begins with what it needs: seconds of every rank's start, and of every restart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tiny_runs

RUN = """
import atexit, sys
atexit.register(lambda: open(sys.argv[0], "w").write("\\n".join(sys.modules)))
from megatron_bit import cli
cli.main()
"""


def test_a_run_imports_no_compiler_and_no_engine_that_it_does_not_use(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("{}\n")
    settings = {"train.steps": 1, "parallel.zero_stage": 0}
    words = ["train", str(tmp_path / "empty.yaml"), *tiny_runs.overrides(tmp_path / "run", tiny_data, settings)]
    code = f"import sys; sys.argv = [{str(tmp_path / 'modules')!r}, *sys.argv[1:]]\n{RUN}"
    subprocess.run([sys.executable, "-c", code, *words], check=True, timeout=120)
    modules = set((tmp_path / "modules").read_text().splitlines())
    unused = {"torch._inductor.compile_fx", "deepspeed", "transformers", "transformer_engine", "sentencepiece"}
    assert "megatron.core" in modules and not unused & modules
