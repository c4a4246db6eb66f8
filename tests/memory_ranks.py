"""What a rank holds in a real step, in bytes: what the plan's memory is compared with."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

VOCABULARY = 4096


class Saved:
    """Context in which the storages that autograd keeps for the backward pass are counted, without the weights."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.weights = list(weights)  # whose storages ZeRO-3 gives back and takes anew
        self.count: dict[int, int] = {}
        self.now = self.peak = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(_Kept.of(self), lambda kept: kept.tensor)

    def __enter__(self) -> Saved:
        self.plain: Any = checkpoint._recomputation_hook
        checkpoint._recomputation_hook = self._recomputed()
        self.hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.hooks.__exit__(*args)
        checkpoint._recomputation_hook = self.plain

    def _recomputed(self) -> Any:
        """torch keeps what a checkpoint computes again by hooks of its own, which hide it from ours."""

        class Hook(self.plain):  # type: ignore[name-defined]
            def __init__(hook, *args: Any) -> None:
                super().__init__(*args)
                pack = hook.pack_hook

                def counted(tensor: Tensor) -> Any:
                    tensor = tensor.detach()
                    tensor.kept = _Kept(self, tensor)  # type: ignore[attr-defined]
                    return pack(tensor)

                hook.pack_hook = counted

        return Hook


class _Kept:
    """One saved tensor, until autograd lets go of it."""

    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self.saved, self.tensor = saved, tensor.detach()  # an output that holds on to its own graph would stay
        storage = tensor.untyped_storage()
        self.key, self.size = storage.data_ptr(), storage.nbytes()
        if any(self.key == weight.untyped_storage().data_ptr() for weight in saved.weights):
            return
        if not saved.count.get(self.key):
            saved.now += self.size
            saved.peak = max(saved.peak, saved.now)
        saved.count[self.key] = saved.count.get(self.key, 0) + 1

    @classmethod
    def of(cls, saved: Saved) -> Any:
        return lambda tensor: cls(saved, tensor)

    def __del__(self) -> None:
        count = self.saved.count
        if self.key not in count:
            return
        count[self.key] -= 1
        if not count[self.key]:
            del count[self.key]
            self.saved.now -= self.size


def live_bytes() -> int:
    """Bytes of the storages of every tensor there is."""
    gc.collect()
    sizes = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def step_bytes(overrides: list[str]) -> dict[str, float]:
    """Runs in a rank: bytes of the second step. What stays after it, the most there is at the end of a backward pass,
    and the most that autograd keeps."""
    from megatron_bit.config import load_config
    from megatron_bit.model.build import build_model
    from megatron_bit.model.chunk import TokenBatch
    from megatron_bit.optim.optimizer import build_optimizer
    from megatron_bit.parallel import groups as process_groups
    from megatron_bit.parallel.step import forward_backward

    torch.set_num_threads(1)
    config = load_config(preset="laptop", overrides=overrides)
    groups = process_groups.init(config)
    before = live_bytes()
    chunks = build_model(config, VOCABULARY, groups, 2)
    if config.train.precision == "bf16":
        for chunk in chunks:
            chunk.bfloat16()
    optimizer = build_optimizer(config, chunks, groups)
    size = config.train.micro_batch_size
    batches = [
        TokenBatch(torch.randint(0, VOCABULARY, (size, config.data.seq_length)), torch.arange(size))
        for _ in range(groups.dims.micro_batches(config))
    ]
    peak: list[int] = []
    first = next(p for chunk in chunks for p in chunk.parameters())  # the last to get its gradient
    first.register_hook(lambda _: peak.append(live_bytes() - before - saved.now))
    for _ in range(2):
        peak.clear()
        saved = Saved(p for chunk in chunks for p in chunk.parameters())
        with saved:
            forward_backward(batches, optimizer, groups)
        peak.append(live_bytes() - before)
        optimizer.step([1e-3] * len(optimizer.base.param_groups))
    after = live_bytes() - before
    process_groups.shutdown()
    return {"after step": after, "with gradients": max(peak), "activations": saved.peak, "left": saved.now}
