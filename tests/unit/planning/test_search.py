"""`megatron-bit plan`: every layout it lists is one that `train` takes, the first is the fastest, and it is quick."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_bit.commands.planning import plan
from megatron_bit.config import load_config
from megatron_bit.errors import UserError
from megatron_bit.parallel.dims import ParallelDims
from megatron_bit.planning.hardware import load_hardware
from megatron_bit.planning.search import Cluster, layouts, search

OWN = """
peak_flops: {fp32: 1.0e+11}
memory: 8.0e+9
memory_bandwidth: 1.0e+10
intra_bandwidth: 1.0e+9
inter_bandwidth: 1.0e+8
matmul_efficiency: {fp32: 0.9}
attention_efficiency: 0.5
"""


def test_settings_select_what_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(("train.global_batch_size=96",), preset="1b", nodes=3, gpus_per_node=4, top=10_000, json=True) == 0
    result = json.loads(capsys.readouterr().out)
    seconds = [layout["seconds"]["total"] for layout in result["layouts"]]
    assert seconds == sorted(seconds) and len(seconds) == result["fit"] > 20
    for layout in result["layouts"]:
        config = load_config(preset="1b", overrides=["train.global_batch_size=96", *layout["settings"]])
        dims = ParallelDims.build(config, 12)
        assert {key: getattr(dims, key) for key in layout["layout"]} == layout["layout"]
        assert layout["memory_bytes"]["total"] <= result["cluster"]["usable_memory_bytes"]
        assert sum(v for k, v in layout["seconds"].items() if k != "total") == pytest.approx(layout["seconds"]["total"])
        assert layout["gpu_hours"] == pytest.approx(layout["seconds"]["total"] * config.train.steps * 12 / 3600)


def test_the_table_and_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    plan((), preset="125m", nodes=1, gpus_per_node=1, top=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1 GPUs (1 nodes of 1): ") and "ZeRO-0" in lines[3]
    assert lines[-1].startswith("settings of the best: parallel.tp=1 parallel.pp=1 ")


def test_sixteen_thousand_gpus_take_seconds() -> None:
    begin = time.process_time()
    config = load_config(preset="8b", overrides=["train.global_batch_size=16384"])
    found = search(config, Cluster(load_hardware("h100"), 2048, 8))
    assert time.process_time() - begin < 8
    assert found.candidates and found.candidates[0].dims.world_size == 16384


def test_nothing_is_left_out_that_the_rules_take() -> None:
    """Against every combination, on a small cluster, of micro-batches that are powers of two."""
    config = load_config(preset="laptop")
    cluster = Cluster(load_hardware("h100"), 2, 2)
    tried = {str((c.parallel, c.train.micro_batch_size)) for c in layouts(config, cluster)}
    count = 0
    for tp in (1, 2):
        for pp in (1, 2, 4):
            for zero in (1, 2, 3) if pp == 1 else (1,):
                if tp * pp == 4:
                    zero = 0
                if 4 % (tp * pp):
                    continue
                for micro in (1, 2, 4, 8, 16):
                    for recompute in ("none", "full"):
                        settings = [f"parallel.tp={tp}", f"parallel.pp={pp}", f"parallel.zero_stage={zero}"]
                        settings += [f"parallel.recompute={recompute}", f"train.micro_batch_size={micro}"]
                        layout = load_config(preset="laptop", overrides=settings)
                        try:
                            ParallelDims.build(layout, 4)
                        except UserError:
                            continue
                        count += 1
                        assert str((layout.parallel, micro)) in tried
    assert count > 30


def test_a_model_that_does_not_fit_says_how_much_it_needs() -> None:
    with pytest.raises(UserError, match=r"none of [\d,]+ layouts fits into 67.1 GiB; the smallest is .* GiB \(weights"):
        plan(("model.hidden_size=16384", "model.num_heads=128", "model.ffn_hidden_size=53248"), preset="8b")


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"plan needs CONFIG.yaml, a run folder or --preset"):
        plan()
    with pytest.raises(UserError, match=r"--device b200 is not known; choose one of a100, h100, h200"):
        plan((), preset="laptop", device="b200")
    with pytest.raises(UserError, match=r"--nodes 0 has to be at least 1"):
        plan((), preset="laptop", nodes=0)
    with pytest.raises(UserError, match=r"train.global_batch_size 16 cannot be split over 7 GPUs in any layout"):
        plan((), preset="laptop", nodes=7, gpus_per_node=1)
    with pytest.raises(UserError, match=r"model.vocab_size=32000"):
        plan(("model.head.kind=softmax", "model.block_size=1"), preset="laptop")
    path = tmp_path / "own.yaml"
    path.write_text(OWN.replace("memory: 8.0e+9", "memory: -1"))
    with pytest.raises(UserError, match=r"memory = -1 \(.*own.yaml\): input should be greater than 0"):
        plan((), preset="laptop", hardware=path)
    path.write_text(OWN.replace("{fp32: 0.9}", "{fp32: 1.9}"))
    with pytest.raises(UserError, match=r"matmul_efficiency of fp32 1.9 has to be above 0 and at most 1"):
        plan((), preset="laptop", hardware=path)
    path.write_text(OWN)
    with pytest.raises(UserError, match=r"train.precision bf16 has no peak_flops and .* which has fp32"):
        plan(("train.precision=bf16",), preset="laptop", hardware=path)
    assert plan((), preset="laptop", hardware=path, gpus_per_node=2) == 0


def test_a_plan_imports_no_torch() -> None:
    code = (
        "import sys; from megatron_bit.commands.planning import plan; plan((), preset='laptop');"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
