"""ZeRO stage 0: every data-parallel rank holds the whole optimizer state, and torch alone does the update.

The default where one data-parallel rank leaves nothing to shard: DeepSpeed would copy all gradients several times
to partition them for a group of one (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_bit.config import Config
from megatron_bit.optim.optimizer import EMA, Fragment, Optimizer
from megatron_bit.parallel.groups import Groups

BUCKET = 2**25  # elements that are reduced together


class ReplicatedOptimizer(Optimizer):
    """Fused AdamW on fp32 masters (the parameters themselves in fp32), clipping and skipping inside its kernel."""

    def __init__(
        self, config: Config, chunks: Sequence[nn.Module], optimizer: torch.optim.Optimizer, groups: Groups
    ) -> None:
        self.chunks = list(chunks)
        self.base = optimizer
        self.managed = groups.dims.pp == 1
        self._clip = config.optim.grad_clip
        self._ema_decay = config.optim.ema_decay
        self._dp = groups.collection.dp
        self._mp = groups.collection.mp
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # a parameter that all TP ranks hold counts once in the norm
        self._counted = [groups.tp_rank == 0 or getattr(p, "tensor_model_parallel", False) for p in self._parameters]
        self._norm: Tensor | float = float("nan")
        self._masters = self._parameters
        self._accumulated: dict[nn.Parameter, Tensor] = {}
        if config.bf16:
            self._keep_masters()

    def _keep_masters(self) -> None:
        """fp32 copies for AdamW, and fp32 sums of the bf16 gradients of micro-batches."""
        masters = {p: nn.Parameter(p.detach().float()) for p in self._parameters}
        self._masters = list(masters.values())
        for group in self.base.param_groups:
            group["params"] = [masters[p] for p in group["params"]]
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._accumulate)

    @torch.no_grad()
    def _accumulate(self, parameter: Any) -> None:
        total = self._accumulated.get(parameter)
        if total is None:
            self._accumulated[parameter] = parameter.grad.float()
        else:
            total.add_(parameter.grad)
        parameter.grad = None

    def forward_backward(self, batches: Sequence[Any]) -> list[Tensor]:
        metrics = []
        for batch in batches:
            output = self.chunks[0](batch)
            (output[0] / len(batches)).backward()
            metrics.append(output[1])
        return metrics

    def forward(self, batch: Any) -> Any:
        return self.chunks[0](batch)

    def _gradients(self) -> list[Tensor]:
        held = self._accumulated if self._accumulated else {p: p.grad for p in self._parameters}
        gradients = [held[p] for p in self._parameters]
        assert all(g is not None for g in gradients), "a parameter without a gradient"
        return gradients  # type: ignore[return-value]

    @torch.no_grad()
    def step(self, lrs: Sequence[float]) -> None:
        gradients = self._gradients()
        _average(gradients, self._dp)
        self._norm = norm = self._global_norm(gradients)
        for master, gradient in zip(self._masters, gradients, strict=True):
            master.grad = gradient
        for group, lr in zip(self.base.param_groups, lrs, strict=True):
            group["lr"] = lr
        # the protocol of torch.amp.GradScaler: the kernel divides by the one and, if the other is set, does nothing
        self.base.found_inf = norm.isfinite().logical_not().float()  # type: ignore[attr-defined]
        self.base.grad_scale = ((norm + 1e-6) / self._clip).clamp(min=1.0) if self._clip else None  # type: ignore[attr-defined]
        self.base.step()
        if self._ema_decay:
            self._follow()
        for parameter in (*self._parameters, *self._masters):
            parameter.grad = None
        self._accumulated.clear()
        if self._masters is not self._parameters:
            _copy(self._parameters, self._masters)

    def _follow(self) -> None:
        """Move the averages; by nothing after a skipped update, so that no step waits to know."""
        weight = (1.0 - self._ema_decay) * (1.0 - self.base.found_inf)  # type: ignore[attr-defined]
        for master in self._masters:
            self.base.state[master][EMA].lerp_(master, weight)

    def _global_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """L2 norm over the whole model, float32 scalar."""
        counted = [g for g, counts in zip(gradients, self._counted, strict=True) if counts]
        squares = torch.nn.utils.get_total_norm(counted).square() if counted else gradients[0].new_zeros(())
        if dist.get_world_size(self._mp) > 1:
            dist.all_reduce(squares, group=self._mp)
        return squares.sqrt()

    @torch.no_grad()
    def poison(self) -> None:
        for gradient in self._gradients():
            gradient.fill_(float("inf"))

    @property
    def skipped(self) -> Tensor | bool:
        return self.base.found_inf  # type: ignore[attr-defined]

    @property
    def grad_norm(self) -> Tensor | float:
        return self._norm

    def create_states(self) -> None:
        for master in self._masters:
            self.base.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
            if self._ema_decay:
                self.base.state[master][EMA] = master.detach().clone()

    def fragments(self) -> Iterator[Fragment]:
        masters = dict(zip(self._parameters, self._masters, strict=True))
        dp_rank, dp_size = dist.get_rank(self._dp), dist.get_world_size(self._dp)
        count = 0
        for index, chunk in enumerate(self.chunks):
            for name, parameter in chunk.named_parameters():
                master = masters[parameter]
                state = self.base.state[master]
                states = {"param": master.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
                if self._ema_decay:
                    states[EMA] = state[EMA]
                flat = {key: tensor.view(-1) for key, tensor in states.items()}
                yield Fragment(index, name, 0, flat, saved=count % dp_size == dp_rank)
                count += 1

    @property
    def updates(self) -> int:
        return int(self.base.state[self._masters[0]]["step"].item())

    @torch.no_grad()
    def loaded(self, updates: int) -> None:
        for master in self._masters:
            self.base.state[master]["step"].fill_(float(updates))
        if self._masters is not self._parameters:
            _copy(self._parameters, self._masters)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    torch._foreach_copy_(list(targets), list(sources))  # pyright: ignore[reportPrivateImportUsage]


def _average(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Replace gradients by their means over the group, BUCKET elements in one collective."""
    size = dist.get_world_size(group)
    if size == 1:
        return
    bucket: list[Tensor] = []
    for index, gradient in enumerate(gradients):
        bucket.append(gradient)
        if index + 1 < len(gradients) and sum(g.numel() for g in bucket) < BUCKET:
            continue
        flat = torch.cat([g.reshape(-1) for g in bucket])
        dist.all_reduce(flat, group=group)
        flat.div_(size)
        parts = [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in bucket]), bucket, strict=True)]
        _copy(bucket, parts)
        bucket = []
