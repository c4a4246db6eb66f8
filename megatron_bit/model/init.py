"""Initial weights, drawn by logical name: the same model whatever the layout (on one kind of device)."""

from __future__ import annotations

import hashlib
import math
import re

import torch
from torch import nn

from megatron_bit.config import Config
from megatron_bit.parallel.groups import Groups
from megatron_bit.parallel.logical import VOCABULARY, pieces
from megatron_bit.parallel.split import FREQUENCIES

_ONES = re.compile(r"(norm|layernorm)\.weight$")
_ZEROS = re.compile(r"(\.bias|modulation\.weight|head\.(output|prior|prior_last)\.weight|head\.tied|memory\.table)$")
_RESIDUAL = re.compile(r"(linear_proj|linear_fc2|layers\.\d+\.(proj|fc2))\.weight$")


_TABLES = (  # of values, and start vectors
    "embedding.start", "embedding.values", "embedding.pairs.factors", "head.previous", "head.values",
    "head.pairs.factors", "head.told", "head.seen_levels.slots",
)  # fmt: skip


@torch.no_grad()
def initialize(chunk: nn.Module, config: Config, groups: Groups) -> None:
    """Fill every parameter of a chunk.

    Each logical tensor has its own generator, seeded by (train.seed, name). It is drawn whole and cut, so peak
    memory is one unsharded tensor in float32.
    """
    parameters = dict(chunk.named_parameters())
    for name, parts in pieces(chunk, groups).items():
        for part in parts:
            part.of(parameters[name]).copy_(draw(part.name, part.full_shape, config, groups.device)[part.slices()])


def draw(name: str, shape: tuple[int, ...], config: Config, device: torch.device) -> torch.Tensor:
    """The initial values of a whole logical tensor, float32."""
    if _ONES.search(name):
        return torch.ones(shape, device=device)
    if _ZEROS.search(name):
        return torch.zeros(shape, device=device)
    digest = hashlib.sha256(f"{config.train.seed}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    whole = torch.randn(shape, generator=generator, device=device) * _std(name, config)
    if name in VOCABULARY:
        whole[config.model.vocab_size :] = 0.0
    return whole


def _std(name: str, config: Config) -> float:
    """Normal(0, init_std); outputs onto the residual stream divided by sqrt(2 layers) (GPT-2).

    What enters beside normalised activations starts at their size: bits and noise level by 1/sqrt(inputs), start
    vectors and embeddings of groups at 1.
    """
    m = config.model
    if name in _TABLES:
        return 1.0
    if name.startswith(("head.noise_level.", "head.seen_levels.")):
        features = FREQUENCIES * config.noise_levels
        return 1.0 / math.sqrt(features if name.endswith("fc1.weight") else m.head.hidden_size)
    if name in ("embedding.fc1.weight", "head.input.weight", "head.estimate.weight"):
        return 1.0 / math.sqrt(m.bits)
    if _RESIDUAL.search(name):
        layers = m.head.num_layers if name.startswith("head.") else m.num_layers
        return m.init_std / math.sqrt(2 * layers)
    return m.init_std
