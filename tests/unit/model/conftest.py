"""A world of one, small odd-sized models, and the independent reference (tests/reference.py)."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import world

from megatron_bit.config import Config, load_config
from megatron_bit.model.bitlm import BitLM
from megatron_bit.model.build import build_model
from megatron_bit.parallel.groups import Groups

# odd where the model allows it, so that a wrong axis or a transposed shape cannot fit by chance
ODD = [
    "model.bits=11", "model.num_layers=2", "model.hidden_size=36", "model.num_heads=6", "model.num_kv_heads=2",
    "model.ffn_hidden_size=39", "model.head.num_layers=2", "model.head.hidden_size=20", "model.head.num_heads=5",
    "model.head.kind=diffusion", "model.group_bits=1", "model.head.ffn_hidden_size=27", "diffusion.noise_samples=3",
    "model.norm_eps=2e-5", "train.seed=77",
]  # fmt: skip
VOCAB_SIZE = 1999
MakeConfig = Callable[..., Config]
MakeModel = Callable[..., BitLM]
one_thread, groups = world.one_thread, world.groups


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    path = Path(__file__).parents[2] / "reference.py"
    spec = importlib.util.spec_from_file_location("mbit_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_config() -> MakeConfig:
    """make_config(block_size, blocks, *overrides): an odd-sized model over `blocks` blocks."""

    def make(block_size: int, blocks: int, *overrides: str) -> Config:
        size = [f"model.block_size={block_size}", f"data.seq_length={block_size * blocks}"]
        return load_config(preset="laptop", overrides=[*ODD, *size, *overrides])

    return make


@pytest.fixture
def make_model(groups: Groups) -> MakeModel:
    """make_model(config): a chunk with every weight moved away from its initial value.

    At the start AdaLN's gates and the output are zero, and hide most of the network from any comparison.
    """

    def make(config: Config, vocab_size: int = VOCAB_SIZE, perturb: bool = True) -> BitLM:
        (model,) = build_model(config, vocab_size, groups)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if perturb:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model

    return make
