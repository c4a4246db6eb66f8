"""A softmax model over an odd vocabulary, built and differentiated in a rank: what `tests/dist` compares over TP."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

VOCAB_SIZE = 301  # padded to 384, which 2 and 3 divide
EOS = 5
SETTINGS = [
    "model.head.kind=softmax", "model.block_size=1", "model.hidden_size=36", "model.num_heads=6",
    "model.num_kv_heads=6", "model.ffn_hidden_size=42", "model.num_layers=1", "model.init_std=0.3",
    "data.seq_length=12", "train.precision=fp32",
]  # fmt: skip


def loss_and_gradients(
    tp: int, sequence_parallel: bool
) -> tuple[list[float], list[float], dict[str, tuple[Any, np.ndarray]]]:
    """Runs in a rank: (metrics of training, metrics of validation, name to (slices, part of the gradient))."""
    from megatron_bit.config import load_config
    from megatron_bit.model.build import build_model
    from megatron_bit.model.chunk import TokenBatch
    from megatron_bit.parallel import groups as process_groups
    from megatron_bit.parallel.logical import pieces

    torch.set_num_threads(1)
    config = load_config(None, [*SETTINGS, f"parallel.tp={tp}", f"parallel.sequence_parallel={sequence_parallel}"])
    groups = process_groups.init(config)
    (model,) = build_model(config, VOCAB_SIZE, groups, EOS)
    tokens = torch.randint(0, VOCAB_SIZE, (3, 12), generator=torch.Generator().manual_seed(1))
    batch = TokenBatch(tokens, torch.arange(3))
    output: Any = model(batch)
    output.loss.backward()
    with torch.no_grad():
        bound: Any = model.eval()(batch)
    parameters = dict(model.named_parameters())
    gradients = {}
    for name, parts in pieces(model, groups).items():
        for part in parts:
            gradient: Any = parameters[name].grad
            places = tuple((s.start, s.stop) for s in part.slices())
            gradients[part.name] = (places, part.of(gradient).numpy().copy())
    process_groups.shutdown()
    return output.metrics.tolist(), bound.per_sample.tolist(), gradients
