"""How long to try: MBIT_FUZZ_SECONDS in all, divided over the tests; without it five examples of each kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

TESTS = 8
TINY = {
    "model": {
        "num_layers": 1, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 64, "block_size": 4,
        "bits": 9, "head": {"num_layers": 1, "hidden_size": 32, "num_heads": 4, "ffn_hidden_size": 48},
    },
    "data": {"path": "data", "seq_length": 64},
    "train": {"global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "steps": 2},
    "optim": {"warmup_steps": 1},
    "log": {"tensorboard": False, "every": 1},
    "checkpoint": {"every": 1},
    "diffusion": {"noise_samples": 1},
}  # fmt: skip


@pytest.fixture(scope="session")
def seconds() -> float:
    """For one test."""
    return float(os.environ.get("MBIT_FUZZ_SECONDS", "60")) / TESTS


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything undamaged: tiny.yaml, data, run, hf, prompts.jsonl."""
    import email
    import json as module

    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (folder / "prompts.jsonl").write_text('{"prompt": "import "}\n{"prompt": "def f("}\n')
    sources = [str(Path(package.__file__).parent) for package in (module, email)]
    command = [str(Path(sys.executable).with_name("megatron-bit"))]
    for words in (
        ["prepare", *sources, "--out", "data", "--vocab-size", "421", "--validation-fraction", "0.2", "--workers", "1"],
        ["train", "tiny.yaml", "run=run"],
        ["convert", "run", "hf"],
    ):
        subprocess.run([*command, *words], cwd=folder, check=True, capture_output=True, timeout=300)
    return folder
