"""Counts, in a training step on a CPU, what would make the host wait for a GPU."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten: Any = torch.ops.aten
WAITING = {  # results, or shapes of results, that the host has to read
    _aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal, _aten._unique2, _aten.unique_dim,
    _aten.unique_consecutive, _aten.bincount, _aten.histc, _aten.is_nonzero,
}  # fmt: skip
METHODS = ("tolist", "numpy", "cpu")  # these do not show in the dispatcher


class _Watch(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        by_flags = packet in (_aten.index, _aten.index_put_) and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        counted = packet is _aten.repeat_interleave and isinstance(args[-1], torch.Tensor)
        if packet in WAITING or by_flags or counted:
            self._found[f"{_site()} {packet.__name__}"] += 1
        return func(*args, **(kwargs or {}))


def _site() -> str:
    """file:function of the innermost frame that is not torch's or this file's."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and not name.endswith("host_syncs.py"):
            parts = name.split("/")
            return f"{'/'.join(parts[-2:])}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


@contextlib.contextmanager
def counted(found: Counter[str]) -> Iterator[None]:
    """Add what happens inside to `found`, by place and operation."""
    real = {name: getattr(torch.Tensor, name) for name in METHODS}

    def watched(name: str) -> Any:
        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            found[f"{_site()} {name}"] += 1
            return real[name](self, *args, **kwargs)

        return method

    for name in METHODS:
        setattr(torch.Tensor, name, watched(name))
    try:
        with _Watch(found):
            yield
    finally:
        for name, method in real.items():
            setattr(torch.Tensor, name, method)


def train(arguments: list[str]) -> dict[str, int]:
    """Runs in a rank: a tiny run; what its third step waits for."""
    import tiny_runs

    from megatron_bit.training.trainer import Trainer

    found: Counter[str] = Counter()
    plain = Trainer.train_step

    def step(self: Trainer, batches: Any) -> None:
        with counted(found) if self.state.step == 2 else contextlib.nullcontext():
            plain(self, batches)

    Trainer.train_step = step  # type: ignore[method-assign]
    assert tiny_runs.train(arguments) == 0
    return dict(found)
