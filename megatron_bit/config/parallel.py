"""`parallel`: the layout of a job."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_bit.config.section import Section


class ParallelConfig(Section):
    tp: int = Field(default=1, ge=1)
    """Tensor-parallel size."""
    pp: int = Field(default=1, ge=1)
    """Pipeline-parallel size. The data-parallel size is what remains: world size / (tp * pp)."""
    vpp: int = Field(default=1, ge=1)
    """Model chunks a pipeline rank; above 1 the schedule is interleaved 1F1B."""
    sequence_parallel: bool = True
    """With tp > 1: shard the activations between tensor-parallel regions along the sequence."""
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """ZeRO stage of the optimizer; 0 shards nothing and needs no DeepSpeed. Stages 2 and 3 need pp = 1.
    `auto`: 1 with several data-parallel ranks, 0 with one."""
    recompute: Literal["none", "head", "full"] = "none"
    """What is computed again in the backward pass instead of kept. `head`: the whole head, one noise sample (of a
    chain: one stage) at a time, so that it needs the memory of one. `full`: the head in the same way, and all of a
    backbone layer but its input."""
    timeout_minutes: float = Field(default=10.0, gt=0)
    """How long a collective may wait for another rank before the job is given up."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.pp > 1 and self.zero_stage in (2, 3):
            raise ValueError(
                f"zero_stage {self.zero_stage} with pp {self.pp} is not possible: DeepSpeed shards gradients in its "
                "own backward, which a pipeline schedule replaces; use zero_stage=1, or pp=1"
            )
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"vpp {self.vpp} needs pp > 1; use vpp=1, or pp=2 and more")
        return self
