"""Tiny runs of several architectures, converted; the trainer's own model of each as the reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import world
from gloo_ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_bit.config import Config, load_config
from megatron_bit.inference.convert import to_hf
from megatron_bit.inference.generate import Generator
from megatron_bit.model.bitlm import BitLM
from megatron_bit.model.build import build_model

one_thread, groups = world.one_thread, world.groups


@dataclass(frozen=True)
class Variant:
    settings: dict[str, Any]
    ranks: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)  # of to_hf


_ODD = {
    "model.hidden_size": 36, "model.num_heads": 6, "model.num_kv_heads": 3, "model.ffn_hidden_size": 39,
    "model.bits": 11, "model.head.hidden_size": 20, "model.head.num_heads": 5, "model.head.ffn_hidden_size": 27,
    "model.head.num_layers": 2, "model.num_layers": 2, "model.norm_eps": 2e-5, "model.rope_base": 500.0,
    "model.head_dim": 8,
}  # fmt: skip
VARIANTS = {
    "sharded_training": Variant({"parallel.tp": 2, "parallel.pp": 2, "parallel.zero_stage": 1}, ranks=4),
    "k1": Variant({
        "model.block_size": 1, "model.attention": "block_causal", "model.num_kv_heads": 2, "model.qk_norm": False,
        "model.code": "gray", "model.num_layers": 2,
    }),
    "k4": Variant({
        "model.block_size": 4, "model.attention": "block_causal", "model.num_kv_heads": 1, "model.code": "random",
        "model.num_layers": 2, "diffusion.log_mean": -0.7, "diffusion.sigma_min": 0.15,
        "diffusion.condition_drop": 0.3, "diffusion.self_condition": 0.5,
    }),
    "groups": Variant({
        **_ODD, "model.group_bits": 4, "model.head.prior": False, "diffusion.condition_drop": 0.3,
        "diffusion.self_condition": 0.5,
    }),
    "direct": Variant({**_ODD, "model.group_bits": 6, "diffusion.parameterization": "direct"}),
    "chain": Variant(
        {
            "model.head.kind": "chain", "model.head_dim": 14, "model.group_bits": 4, "model.head.window": 5,
            "diffusion.condition_drop": 0.3, "parallel.tp": 2, "parallel.pp": 2,
        },
        ranks=4,
    ),
    "chain_k1": Variant({**_ODD, "model.head.kind": "chain", "model.block_size": 1}),
    "names": Variant(
        {
            "model.head.kind": "chain", "model.group_bits": 4, "model.names": "pairs", "model.head.prior_rank": 6,
            "diffusion.condition_drop": 0.3, "parallel.tp": 2, "parallel.pp": 2, "diffusion.noisy_every": 2,
        },
        ranks=4,
    ),
    "memory": Variant(
        {
            "model.head.kind": "chain", "model.group_bits": 4, "model.memory.rows": 6, "model.memory.orders": [2, 3],
            "model.memory.hashes": 2, "diffusion.condition_drop": 0.3, "parallel.tp": 2, "parallel.pp": 2,
            "diffusion.noisy_every": 3,
        },
        ranks=4,
    ),
    "names_joint": Variant(
        {**_ODD, "model.group_bits": 4, "model.names": "pairs", "model.memory.rows": 5, "model.memory.orders": [1, 4]}
    ),
    "seeing": Variant(
        {
            **_ODD, "model.group_bits": 4, "model.names": "pairs", "model.head.token_before": True,
            "model.head.soft_prior": True, "diffusion.levels_apart": 1, "diffusion.condition_drop": 0.3,
            "diffusion.self_condition": 0.5,
        }
    ),
    "logistic": Variant({**_ODD, "diffusion.noise": "logistic", "diffusion.log_mean": -0.4, "diffusion.log_std": 0.6}),
    "entropy_rate": Variant({**_ODD, "diffusion.noise": "entropy_rate", "diffusion.noise_warmup": 0}),
    "odd": Variant(_ODD, arguments={"shard_size": "20KB"}),
    "bf16": Variant(_ODD, arguments={"dtype": "bfloat16"}),
}  # fmt: skip


@dataclass(frozen=True)
class Converted:
    run: Path
    folder: Path
    data: Path


@pytest.fixture(scope="session")
def converted(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Converted]:
    """Every variant: a run of one step with no weight at zero, and its folder."""
    root = tmp_path_factory.mktemp("converted")
    out: dict[str, Converted] = {}
    for name, variant in VARIANTS.items():
        run, folder = root / "runs" / name, root / name
        if name == "bf16":  # the same run in another dtype
            run = out["odd"].run
        else:
            settings = {**variant.settings, "train.steps": 1, "evaluate.noise_samples": 3}
            codes = run_ranks(tiny_runs.train, variant.ranks, tiny_runs.overrides(run, tiny_data, settings))
            assert codes == [0] * variant.ranks
        to_hf(run, folder, **variant.arguments)
        out[name] = Converted(run, folder, tiny_data)
    return out


@pytest.fixture(scope="session")
def tiny_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, of text."""
    run = tmp_path_factory.mktemp("tiny") / "run"
    settings = {"train.steps": 1, "checkpoint.every": 1}
    assert run_ranks(tiny_runs.train, 1, tiny_runs.overrides(run, tiny_data, settings)) == [0]
    return run


@dataclass
class Trainer:
    """The model that trains, with the weights of a checkpoint."""

    model: BitLM
    config: Config

    def hidden(self, tokens: Tensor) -> Tensor:
        """The states [b, S, D] for tokens [b, S]."""
        with torch.no_grad():
            return self.model.hidden(tokens).transpose(0, 1)


@pytest.fixture(scope="session")
def trainer(converted: dict[str, Converted]) -> Callable[[str], Trainer]:
    made: dict[str, Trainer] = {}

    def make(name: str) -> Trainer:
        if name not in made:
            from megatron_bit.checkpoint.load import load_weights
            from megatron_bit.run.folder import newest_checkpoint

            run = converted[name].run
            overrides = ["parallel.tp=1", "parallel.pp=1", "parallel.zero_stage=0", "train.seed=11"]
            config = load_config(run / "config.yaml", overrides)
            groups = world.of_one()
            (model,) = build_model(config, 421, groups)
            load_weights(newest_checkpoint(run), [model], groups)
            made[name] = Trainer(model.eval(), config)
        return made[name]

    return make


@pytest.fixture(scope="session")
def generator(converted: dict[str, Converted]) -> Callable[[str], Generator]:
    made: dict[str, Generator] = {}

    def make(name: str) -> Generator:
        if name not in made:
            made[name] = Generator(converted[name].folder)
        return made[name]

    return make


@pytest.fixture(scope="session")
def inputs(converted: dict[str, Converted]) -> dict[str, dict[str, Tensor]]:
    """For every variant two full-length samples and noise for them."""
    out = {}
    for name, it in converted.items():
        config = json.loads((it.folder / "config.json").read_text())
        k, bits, length = config["block_size"], config["bits"], config["max_position_embeddings"]
        g = torch.Generator().manual_seed(3)
        log_sigma = torch.rand(2, length // k, 3, generator=g) * 6 - 2
        noise = torch.randn(2, length // k, 3, k, bits, generator=g)
        out[name] = {
            "tokens": torch.randint(0, 421, (2, length), generator=g),
            "sample": torch.tensor([7, 2**33 + 5]),
            "log_sigma": log_sigma,
            "noisy_bits": noise * (1 + log_sigma.exp()[..., None, None]),
        }
    return out


@pytest.fixture(scope="session")
def elsewhere(
    converted: dict[str, Converted], inputs: dict[str, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """What elsewhere.py computes in an environment of its own, which has our dependencies and not our packages.

    With the site-packages on PYTHONPATH rather than as a site folder its .pth files are not read, and those are how an
    editable installation is found.
    """
    root = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root / "venv")], check=True, timeout=60)
    cases = root / "cases.json"
    cases.write_text(json.dumps({name: str(it.folder) for name, it in converted.items()}))
    for name, tensors in inputs.items():
        save_file(tensors, f"{cases}.{name}")
    script = root / "elsewhere.py"
    script.write_text((Path(__file__).parent / "elsewhere.py").read_text())
    done = subprocess.run(
        [str(root / "venv" / "bin" / "python"), "-P", str(script), str(cases), str(root / "out.safetensors")],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": sysconfig.get_paths()["purelib"],
            "HOME": str(root),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        cwd=root,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_file(root / "out.safetensors")
