"""What autograd keeps for the backward pass, in bytes, as it comes and goes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint


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
            def __init__(hook, *args: Any) -> None:  # pyright: ignore[reportSelfClsParameterName]
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
