"""The only file that knows that megatron-core wants CUDA.

megatron-core 0.16.1 names the device itself: `torch.cuda.current_device()` for communication buffers,
`device="cuda"` in the pipeline schedules, CUDA generators for its random-state tracker. Under gloo there is
no CUDA device, so `prepare()` answers those calls with the CPU. Where CUDA exists it changes nothing but to
seed the tracker, which sequence parallelism and recomputation fork on either device.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch

_prepared = False


class _CpuTorch(types.ModuleType):
    """Stands for the module `torch` where megatron-core writes device="cuda" into a factory call."""

    _factories = frozenset({"zeros", "ones", "empty", "tensor"})

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in self._factories:
            return value
        return lambda *args, **kwargs: value(*args, **{**kwargs, "device": "cpu"})


def prepare(fused: bool = False) -> None:
    """Make megatron-core usable on this device. Only the first call counts, before groups or models are built.

    fused: have its own fused functions compiled. This system calls none of them (model/backbone.py); GPTModel does.
    """
    global _prepared
    if _prepared:
        return
    _prepared = True
    # One CUDA work queue keeps TP communication and compute in issue order, as Megatron's overlap expects.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # advice on TE, apex and deprecated options of its own; `megatron-bit doctor` gives it where it helps
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    # names of collectives that megatron-core 0.16.1 still uses and torch 2.13 deprecates
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # megatron-core imports it, and it tells every rank of a CUDA toolkit without a GPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with _light_import(fused):
        from megatron.core.tensor_parallel import random as mcore_random

    if torch.cuda.is_available():
        return
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *args, **kwargs: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    class CpuRngTracker(mcore_random.CudaRNGStatesTracker):
        """The tracker on CPU generator states."""

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    mcore_random._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    mcore_random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
    mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True

    from megatron.core.pipeline_parallel import schedules

    schedules.torch = _CpuTorch("torch")  # type: ignore[attr-defined]


@contextlib.contextmanager
def _light_import(fused: bool) -> Iterator[None]:
    """Import megatron-core in a third of the time (torch 2.13.0: 1.0 s of one core instead of 3.0).

    It wraps its fused functions by `torch.compile` as they are defined, and the first call of that imports Inductor.
    And what imports leave behind is not looked through again by every later collection of garbage, which stops one
    rank, and with it all of them, for half a second.
    """
    compiler = torch.compile
    if not fused:
        torch.compile = lambda model=None, **_: model if model is not None else lambda f: f
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        torch.compile = compiler
        gc.freeze()
        atexit.register(gc.unfreeze)  # or triton tells at the end what of it is left
        if collecting:
            gc.enable()


def seed_tracker(seed: int) -> None:
    """Seed megatron-core's tracker. Nothing in this system draws from it (no dropout), but it has to exist."""
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    if torch.cuda.is_available():
        tensor_parallel.model_parallel_cuda_manual_seed(seed % 2**31)
        return
    tracker: Any = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("model-parallel-rng", seed % 2**31)


def device() -> torch.device:
    """The device of this rank."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
