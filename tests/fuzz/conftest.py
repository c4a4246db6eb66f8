"""How long to try: MBIT_FUZZ_SECONDS in all, divided over the tests; without it four examples of each kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

TESTS = 11
TINY = {
    "model": {
        "num_layers": 1, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 64, "block_size": 4,
        "bits": 9, "head": {"num_layers": 1, "hidden_size": 32, "num_heads": 4, "ffn_hidden_size": 48},
    },
    "data": {"path": "data", "seq_length": 64},
    "train": {"global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "steps": 2},
    "optim": {"warmup_steps": 1},
    "log": {"to": [], "every": 1},
    "checkpoint": {"every": 1},
    "diffusion": {"noise_samples": 1},
}  # fmt: skip
CLUSTER = {"partition": "train", "nodes": 2, "time": "1:00:00", "ranks_per_node": 1, "cpus_per_node": 2}
TASKS = {
    "lambada/lambada_test.jsonl": '{"text": "he said that she said"}\n{"text": "one and one and one"}\n',
    "hellaswag/hellaswag_val_full.txt": "A thing: it\n1\nis\nwas\nwill\nhas\n",
    "piqa/valid.jsonl": '{"goal": "do it", "sol1": "so", "sol2": "not so"}\n',
    "piqa/valid-labels.lst": "1\n",
}
ATTEMPTS: list[dict[str, Any]] = [
    {"attempt": "7.0", "job": "7", "nodes": "n1", "begin": 1.7e9, "from_step": 0},
    {"attempt": "7.0", "end": 1.7e9 + 60, "step": 1, "outcome": "asked", "reason": "time limit", "again": True},
    {"attempt": "7.1", "job": "7", "nodes": "n1", "begin": 1.7e9 + 90, "from_step": 1},
]


@pytest.fixture(scope="session")
def seconds() -> float:
    """For one test."""
    return float(os.environ.get("MBIT_FUZZ_SECONDS", "60")) / TESTS


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything undamaged: tiny.yaml, data, run, hf, prompts.jsonl, cluster.yaml, tasks."""
    import email
    import json as module

    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (folder / "prompts.jsonl").write_text('{"prompt": "import "}\n{"prompt": "def f("}\n')
    (folder / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    for name, content in TASKS.items():
        (folder / "tasks" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tasks" / name).write_text(content)
    sources = [str(Path(package.__file__).parent) for package in (module, email)]
    command = [str(Path(sys.executable).with_name("megatron-bit"))]
    for words in (
        ["prepare", *sources, "--out", "data", "--vocab-size", "421", "--validation-fraction", "0.2", "--workers", "1"],
        ["train", "tiny.yaml", "run=run"],
        ["convert", "run", "hf"],
    ):
        subprocess.run([*command, *words], cwd=folder, check=True, capture_output=True, timeout=300)
    submission = folder / "run" / "slurm" / "0000"
    submission.mkdir(parents=True)
    (submission / "attempts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in ATTEMPTS))
    return folder
