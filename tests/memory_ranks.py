"""What a rank holds in a real step, in bytes: what the plan's memory is compared with."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

VOCABULARY = 4096


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
    from megatron_bit.bench.saved import Saved
    from megatron_bit.config import load_config
    from megatron_bit.model.build import build_model
    from megatron_bit.model.chunk import TokenBatch
    from megatron_bit.optim.build import build_optimizer
    from megatron_bit.parallel import groups as process_groups
    from megatron_bit.training.step import forward_backward

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
