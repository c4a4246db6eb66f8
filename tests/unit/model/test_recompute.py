"""What is computed again instead of kept: the same numbers, in memory that does not grow with the evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_bit.config import Config
from megatron_bit.model.build import build_model
from megatron_bit.model.chunk import TokenBatch
from megatron_bit.parallel.groups import Groups

HEADS = {
    "bits": [],
    "groups": ["model.group_bits=4", "diffusion.self_condition=0.5"],
    "chain": ["model.head.kind=chain", "model.group_bits=3"],
    "measured": ["diffusion.noise=entropy_rate", "diffusion.condition_drop=0.2"],
}


def _step(config: Config, groups: Groups) -> tuple[Any, dict[str, torch.Tensor], int]:
    """(loss output, gradients, bytes that autograd keeps)."""
    model = build_model(config, 1999, groups)[0]
    torch.manual_seed(5)
    for parameter in model.parameters():
        if not parameter.any():  # zero at the start: nothing behind it would be seen
            torch.nn.init.normal_(parameter, std=0.1)
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = TokenBatch(torch.randint(0, 1999, (2, config.data.seq_length)), torch.tensor([3, 8]))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(batch)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    output.loss.backward()
    return output, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, size


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("what", ["head", "full"])
def test_the_same_loss_and_gradients(what: str, head: str, make_config: Callable[..., Config], groups: Groups) -> None:
    plain, grads, kept = _step(make_config(3, 5, *HEADS[head]), groups)
    again, others, less = _step(make_config(3, 5, *HEADS[head], f"parallel.recompute={what}"), groups)
    torch.testing.assert_close(again.loss, plain.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(again.metrics, plain.metrics, rtol=1e-5, atol=1e-6)
    assert others.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, rtol=1e-4, atol=1e-7, msg=name)
    assert less < kept


@pytest.mark.parametrize(("few", "many"), [("diffusion.noise_samples=2", "diffusion.noise_samples=8")])
def test_memory_of_one_evaluation(few: str, many: str, make_config: Callable[..., Config], groups: Groups) -> None:
    """What grows with the noise samples is the noisy bits, and their loss."""
    sizes = [_step(make_config(3, 5, m, "parallel.recompute=head"), groups)[2] for m in (few, many)]
    tokens, bits = 2 * 15, 11
    assert sizes[1] - sizes[0] < 6 * tokens * (2 * bits + 10) * 4
    whole = [_step(make_config(3, 5, m), groups)[2] for m in (few, many)]
    assert whole[1] - whole[0] > 10 * (sizes[1] - sizes[0])
