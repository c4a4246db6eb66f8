"""The linear layers of `train.precision`."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_bit.config import Config
from megatron_bit.parallel.agree import on_every_rank
from megatron_bit.parallel.groups import Groups
from megatron_bit.precision.linears import Linears


def build_linears(config: Config, groups: Groups) -> Linears:
    """For `train.precision`; UserError on every rank if a device or a package for it is missing."""
    if config.train.precision == "fp8":
        from megatron_bit.precision import te

        on_every_rank(lambda: te.require(config.fp8.recipe))
        return te.TransformerEngineLinears(config, _amax_group())
    if config.train.precision == "fp8_emulated":
        from megatron_bit.precision.emulated import EmulatedLinears

        return EmulatedLinears(config, _amax_group(), groups.device)
    return Linears()


def _amax_group() -> dist.ProcessGroup:
    """The ranks that have a part of the same layers: tensor- and data-parallel."""
    from megatron.core import parallel_state

    group: Any = parallel_state.get_amax_reduction_group(with_context_parallel=True)
    return group
