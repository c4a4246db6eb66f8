"""AdamW's parameter groups: decay on matrices only, and a learning rate of its own for the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from megatron_bit.config import Config

NUM_GROUPS = 4  # (backbone, head) x (decay, no decay)
_POSITIONS = ("embedding.start", "head.position")  # two-dimensional, but learned vectors, not matrices


def parameter_groups(chunks: Sequence[nn.Module], config: Config) -> list[dict[str, Any]]:
    """Exactly NUM_GROUPS groups; each carries `lr_scale`, its learning rate over the schedule's.

    A pipeline stage without a head would have fewer. DeepSpeed makes a collective over the model-parallel ranks
    for every group when it computes the gradient norm, so that stages with different counts wait for each other
    for ever: there the largest group is cut in two until the count is right.
    """
    buckets: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            head = name.startswith("head.")
            decay = parameter.dim() >= 2 and name not in _POSITIONS
            buckets.setdefault((head, decay), []).append(parameter)
    groups = [
        {
            "params": parameters,
            "lr_scale": config.optim.head_lr_scale if head else 1.0,
            "weight_decay": config.optim.weight_decay if decay else 0.0,
        }
        for (head, decay), parameters in sorted(buckets.items(), key=lambda item: item[0])
    ]
    while len(groups) < NUM_GROUPS:
        index = max(range(len(groups)), key=lambda i: len(groups[i]["params"]))
        parameters = groups[index]["params"]
        half = len(parameters) // 2
        assert half, "a pipeline stage has fewer parameters than groups"
        groups[index : index + 1] = [{**groups[index], "params": p} for p in (parameters[:half], parameters[half:])]
    return groups


def adamw(groups: list[dict[str, Any]], config: Config) -> torch.optim.AdamW:
    """torch's fused AdamW (DeepSpeed's own compiles at the first start)."""
    o = config.optim
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=0.0, fused=True)
