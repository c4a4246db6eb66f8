"""The only file that knows DeepSpeed's engine: ZeRO-1 under a pipeline schedule, ZeRO-1/2/3 without.

DeepSpeed owns the optimizer. With pp = 1 its engine also drives the backward pass, so that gradients are reduced
and partitioned while it runs. With pp > 1 megatron-core's schedule drives it and DeepSpeed is told not to count
micro-batches ("unmanaged" accumulation, new in 0.19): it reduces once, in `step`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_bit.config import Config
from megatron_bit.model.chunk import ModelChunk
from megatron_bit.optim.optimizer import EMA, STATES, Fragment, Optimizer
from megatron_bit.parallel.dims import BUCKET
from megatron_bit.parallel.groups import Groups


class _Mpu:
    """What DeepSpeed asks a Megatron-style model-parallel unit, answered by megatron-core."""

    def __init__(self, groups: Groups) -> None:
        from megatron.core import parallel_state

        self._state = parallel_state
        self._mp = groups.collection.mp

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def get_model_parallel_group(self) -> Any:
        return self._mp

    def get_model_parallel_world_size(self) -> int:
        return torch.distributed.get_world_size(self._mp)

    def get_model_parallel_rank(self) -> int:
        return torch.distributed.get_rank(self._mp)


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # asked for even in a world of one
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # It would compile a shared-memory all-reduce (over a minute), and a killed build leaves a lock behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _ask_once()
    return deepspeed


def _ask_once() -> None:
    """Let ZeRO-1/2 read the gradient norm once a step.

    Its step reads it to decide whether to skip, and again before the update of every parameter group, each time waiting
    for the device; the answer about one tensor stays the same.
    """
    from deepspeed.runtime.zero import stage_1_and_2 as module

    ask, last = module.is_invalid_grad_norm, [None, False]
    if getattr(ask, "asks_once", False):
        return

    def once(norm: Any) -> bool:
        if norm is not last[0] or not isinstance(norm, Tensor):
            last[:] = [norm, ask(norm)]
        return bool(last[1])

    once.asks_once = True  # type: ignore[attr-defined]
    module.is_invalid_grad_norm = once


class ZeroOptimizer(Optimizer):
    """AdamW under ZeRO over this rank's chunks."""

    def __init__(
        self, config: Config, chunks: Sequence[nn.Module], optimizer: torch.optim.Optimizer, groups: Groups
    ) -> None:
        deepspeed = _import_deepspeed()
        self.chunks = list(chunks)
        self.base = optimizer
        self.stage = groups.dims.zero_stage
        self.managed = groups.dims.pp == 1
        self._device = groups.device
        self._ema_decay = config.optim.ema_decay
        self._states = (*STATES, EMA) if self._ema_decay else STATES
        module = self.chunks[0] if self.managed else nn.ModuleList(self.chunks)
        micro_batches = groups.dims.micro_batches(config)
        settings: dict[str, Any] = {
            "train_batch_size": config.train.global_batch_size,
            "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": config.optim.grad_clip,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self.stage,
                # its default, 5e8 elements, is allocated whole, whatever the model's size
                "reduce_bucket_size": min(BUCKET, sum(p.numel() for p in module.parameters())),
                # hooks reduce during the backward pass; under a schedule the reduction waits for `step`
                "overlap_comm": torch.cuda.is_available() and self.managed,
            },
            "steps_per_print": None,
        }
        if not self.managed:
            settings["managed_gradient_accumulation"] = False
        if config.bf16:
            settings["bf16"] = {"enabled": True, "immediate_grad_update": True, "check_grad_overflow": True}
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        self.engine = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, mpu=_Mpu(groups), dist_init_required=False
        )[0]
        if self.stage == 3:
            # it finds them out in a forward pass, but not in the first one of training if a validation came before:
            # then the backward pass met a parameter that was partitioned again
            for chunk in (chunk for chunk in chunks if isinstance(chunk, ModelChunk)):
                for parameter in chunk.borrowed:
                    deepspeed.zero.register_external_parameter(chunk, parameter)

    def forward_backward(self, batches: Sequence[Any]) -> list[Tensor]:
        metrics = []
        for index, batch in enumerate(batches):
            if index:
                self.engine.step()  # between micro-batches this only counts
            output = self.engine(batch)
            self.engine.backward(output[0])
            metrics.append(output[1])
        return metrics

    def forward(self, batch: Any) -> Any:
        return self.engine(batch)

    def step(self, lrs: Sequence[float]) -> None:
        for group, lr in zip(self.base.param_groups, lrs, strict=True):
            group["lr"] = lr
        self.engine.step()
        if self._ema_decay and not self.skipped:  # DeepSpeed has waited to know
            self._follow()

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the averages of the weights."""
        for flat in self._flat_partitions():
            self.base.state[flat][EMA].lerp_(flat, 1.0 - self._ema_decay)

    @torch.no_grad()
    def poison(self) -> None:
        # where DeepSpeed keeps gradients at this point depends on stage and precision
        zero = self.engine.optimizer
        held = [p.grad for chunk in self.chunks for p in chunk.parameters() if p.grad is not None]
        for gradients in getattr(zero, "averaged_gradients", {}).values():
            held.extend(g for g in gradients or () if g is not None)
        held.extend(getattr(zero, "fp32_groups_gradients_flat", ()))  # bf16, stage 1
        assert held, "no gradients to poison"
        for gradient in held:
            gradient.fill_(float("inf"))

    @property
    def skipped(self) -> bool:
        return bool(self.engine.optimizer.overflow)

    @property
    def grad_norm(self) -> Tensor | float:
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else norm

    def _flat_partitions(self) -> list[Tensor]:
        zero = self.engine.optimizer
        if self.stage == 3:
            return list(zero.fp32_partitioned_groups_flat)
        return [p for group in self.base.param_groups for p in group["params"]]

    def create_states(self) -> None:
        for flat in self._flat_partitions():
            if not self.base.state.get(flat):
                self.base.state[flat] = {
                    "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                    "exp_avg": torch.zeros_like(flat),
                    "exp_avg_sq": torch.zeros_like(flat),
                }
                if self._ema_decay:
                    self.base.state[flat][EMA] = flat.detach().clone()
        if (
            self.stage < 3
        ):  # DeepSpeed links all groups' states in the first group's first step, when the rest have none
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def fragments(self) -> Iterator[Fragment]:
        dp_rank = torch.distributed.get_rank(self.engine.optimizer.dp_process_group) if self.stage == 3 else 0
        for index, chunk in enumerate(self.chunks):
            for name, parameter in chunk.named_parameters():
                if self.stage == 3:
                    yield from self._stage3_fragment(index, name, parameter, dp_rank)
                    continue
                mapping = parameter._hp_mapping  # type: ignore[attr-defined]
                if mapping is not None:
                    states = {"param": mapping.get_hp_fragment().detach()}
                    states |= {key: mapping.get_optim_state_fragment(key) for key in self._states[1:]}
                    yield Fragment(index, name, mapping.lp_fragment_address.start, states)

    def _stage3_fragment(self, index: int, name: str, parameter: Any, dp_rank: int) -> Iterator[Fragment]:
        zero = self.engine.optimizer
        partition = parameter.ds_tensor.ds_numel
        start = partition * dp_rank
        count = min(partition, parameter.ds_numel - start)  # the last partition is padded
        if count > 0:
            states = {
                key: zero._get_fp32_opt_state_partition(
                    parameter, release_swap_buffers=False, optim_state_key=None if key == "param" else key
                )[0]
                .detach()
                .narrow(0, 0, count)
                for key in self._states
            }
            yield Fragment(index, name, start, states)

    @property
    def updates(self) -> int:
        state = self.base.state.get(self._flat_partitions()[0])
        return int(state["step"].item()) if state else 0

    def loaded(self, updates: int) -> None:
        for flat in self._flat_partitions():
            self.base.state[flat]["step"].fill_(float(updates))
        zero = self.engine.optimizer
        if self.stage == 3:
            for group, flat in enumerate(zero.fp32_partitioned_groups_flat):
                zero.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
            zero._partition_all_parameters()
        else:
            zero.update_lp_params()
