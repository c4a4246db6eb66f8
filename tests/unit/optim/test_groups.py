"""Parameter groups: what decays, whose learning rate is scaled, and how many groups there are."""

import pytest
import torch
from torch import nn

from megatron_bit.config import load_config
from megatron_bit.optim.groups import NUM_GROUPS, adamw, parameter_groups

CONFIG = load_config(preset="laptop", overrides=["optim.weight_decay=0.3", "optim.head_lr_scale=0.5", "optim.lr=0.01"])
VECTORS = {
    "embedding.start",
    "embedding.norm.weight",
    "backbone.norm.weight",
    "head.position",
    "head.noise_level.bias",
    "head.modulation.bias",
}


class Stage(nn.Module):
    """The names and dimensions of a pipeline stage: first, last, both or neither."""

    def __init__(self, first: bool, last: bool, layers: int = 3) -> None:
        super().__init__()
        if first:
            self.embedding = nn.Module()
            self.embedding.start = nn.Parameter(torch.randn(3, 5))
            self.embedding.fc1 = nn.Linear(7, 5, bias=False)
            self.embedding.norm = nn.RMSNorm(5)
        self.backbone = nn.Module()
        self.backbone.layers = nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(layers))
        self.backbone.norm = nn.RMSNorm(5)
        if last:
            self.head = nn.Module()
            self.head.position = nn.Parameter(torch.randn(3, 5))
            self.head.noise_level = nn.Linear(5, 5)
            self.head.modulation = nn.Linear(5, 5)


def by_name(chunks, groups):
    """Name to the group that holds it; every parameter has to be in exactly one."""
    owner = {id(p): group for group in groups for p in group["params"]}
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    assert sum(len(g["params"]) for g in groups) == len(parameters) == len(owner)
    return {name: owner[id(p)] for chunk in chunks for name, p in chunk.named_parameters()}


@pytest.mark.parametrize("layout", ["whole", "first", "middle", "last", "last without layers", "two chunks"])
def test_membership_and_count(layout):
    chunks = {
        "whole": [Stage(True, True)],
        "first": [Stage(True, False)],
        "middle": [Stage(False, False)],
        "last": [Stage(False, True)],
        "last without layers": [Stage(False, True, layers=0)],
        "two chunks": [Stage(True, False), Stage(False, False)],
    }[layout]
    groups = parameter_groups(chunks, CONFIG)
    assert len(groups) == NUM_GROUPS == 4
    assert all(group["params"] for group in groups), "DeepSpeed cannot flatten an empty group"
    for name, group in by_name(chunks, groups).items():
        assert group["weight_decay"] == (0.0 if name in VECTORS else 0.3), name
        assert group["lr_scale"] == (0.5 if name.startswith("head.") else 1.0), name


def test_adamw_decays_matrices_only_and_scales_the_head():
    """With zero gradients one update multiplies what decays by 1 - lr * weight_decay and leaves the rest alone."""
    chunk = Stage(True, True)
    before = {n: p.detach().clone() for n, p in chunk.named_parameters()}
    optimizer = adamw(parameter_groups([chunk], CONFIG), CONFIG)
    assert optimizer.defaults["betas"] == CONFIG.optim.betas and optimizer.defaults["eps"] == CONFIG.optim.eps
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["lr_scale"]
    for parameter in chunk.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in chunk.named_parameters():
        factor = 1.0 if name in VECTORS else 1 - 0.1 * 0.3 * (0.5 if name.startswith("head.") else 1.0)
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=1e-7)
