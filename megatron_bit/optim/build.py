"""The optimizer of `parallel.zero_stage`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from megatron_bit.config import Config
from megatron_bit.optim.groups import adamw, parameter_groups
from megatron_bit.optim.optimizer import Optimizer
from megatron_bit.parallel.groups import Groups


def build_optimizer(config: Config, chunks: Sequence[nn.Module], groups: Groups) -> Optimizer:
    """DeepSpeed's ZeRO for the stages that shard something; plain torch where nothing is to be sharded."""
    base = adamw(parameter_groups(chunks, config), config)
    optimizer: Optimizer
    if groups.dims.zero_stage == 0:
        from megatron_bit.optim.replicated import ReplicatedOptimizer

        optimizer = ReplicatedOptimizer(config, chunks, base, groups)
    else:
        from megatron_bit.optim.zero import ZeroOptimizer

        optimizer = ZeroOptimizer(config, chunks, base, groups)
    optimizer.create_states()
    return optimizer
