"""Small layers shared by backbone and head, and how replicated parameters behave under tensor parallelism."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mbit_kernels.rms_norm import rms_norm
from mbit_kernels.swiglu import swiglu
from torch import Tensor, nn

from megatron_bit.config import Config
from megatron_bit.diffusion.bit_groups import BitGroups
from megatron_bit.parallel.split import FREQUENCIES

PARTIAL = "tp_partial_grad"  # a replicated parameter whose gradient is a partial sum on every TP rank


def mark_partial(module: nn.Module, partial: bool) -> None:
    """Say of all parameters of `module` that each TP rank sees a part of their use (SP: part of the sequence)."""
    for parameter in module.parameters():
        setattr(parameter, PARTIAL, partial)


def sum_partial_grads(module: nn.Module, tp_group: dist.ProcessGroup) -> None:
    """Complete the gradients of partial parameters inside the backward pass, by an all-reduce over TP.

    Megatron does this once after the last micro-batch. Doing it where the gradient appears costs a small
    collective per parameter and micro-batch, and in return holds under every ZeRO stage, where the gradient is
    reduced and given away before the backward pass has ended. The sum is taken in float32.
    """
    if dist.get_world_size(tp_group) == 1:
        return

    def hook(grad: Tensor) -> Tensor:
        total = grad.float().contiguous()
        total = total.clone() if total.data_ptr() == grad.data_ptr() else total
        dist.all_reduce(total, group=tp_group)
        return total.to(grad.dtype)

    for parameter in module.parameters():
        if getattr(parameter, PARTIAL, False):
            parameter.register_hook(hook)


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale, in the form that megatron-core's layer specs build.

    megatron-core's own wrapper refuses sequence parallelism.
    """

    partial_always = False

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=init_device(config)))
        self.eps = eps
        mark_partial(self, self.partial_always or config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class QKNorm(RMSNorm):
    """RMSNorm over a head's channels: each TP rank holds some of the heads, so its gradient is always partial."""

    partial_always = True


class SwiGLU(nn.Module):
    """SwiGLU in the form that megatron-core's layer specs build: [..., 2 F] to [..., F]."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)


def init_device(config: Any) -> torch.device:
    """Where parameters of this megatron-core configuration are created."""
    return torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())


def linear(config: Any, inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    """A replicated linear layer (weights the same on every TP rank), partial under sequence parallelism."""
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=config.params_dtype, device=init_device(config))
    mark_partial(layer, config.sequence_parallel)
    return layer


def fp8_linear(config: Any, inputs: int, outputs: int, bias: bool = False) -> nn.Module:
    """As `linear`, and in FP8 where the precision says so."""
    layer = config.linears.replicated(inputs, outputs, bias, config.params_dtype, init_device(config))
    mark_partial(layer, config.sequence_parallel)
    return layer


def column(config: Any, tp_group: dist.ProcessGroup, inputs: int, outputs: int) -> nn.Module:
    """A linear layer whose outputs are split over TP: [s, b, inputs] to ([S, b, outputs / tp], None)."""
    return config.linears.column(
        inputs, outputs, config=config, init_method=_by_name, bias=False, gather_output=False, skip_bias_add=False,
        is_expert=False, tp_group=tp_group,
    )  # fmt: skip


def row(config: Any, tp_group: dist.ProcessGroup, inputs: int, outputs: int) -> nn.Module:
    """A linear layer whose inputs are split over TP: [S, b, inputs / tp] to ([s, b, outputs], None)."""
    return config.linears.row(
        inputs, outputs, config=config, init_method=_by_name, bias=False, input_is_parallel=True, skip_bias_add=False,
        is_expert=False, tp_group=tp_group,
    )  # fmt: skip


def _by_name(weight: Tensor) -> None:
    """Weights are drawn by name (model/init.py)."""


def level_frequencies(mcore: Any) -> Tensor:
    """Of `level_features`; in float64 until they are made, so that every device has the same: the angle multiplies what
    is rounded here."""
    exponent = torch.linspace(0.0, math.log(100.0), FREQUENCIES // 2, dtype=torch.float64)
    return exponent.exp().float().to(init_device(mcore))


def level_features(log_sigma: Tensor, frequency: Tensor) -> Tensor:
    """Sinusoids of ln(sigma) / 4 (EDM's c_noise), float32 [...] to [..., FREQUENCIES]."""
    angle = (log_sigma * 0.25)[..., None] * frequency
    return torch.cat((torch.cos(angle), torch.sin(angle)), dim=-1)


def value_table(mcore: Any, groups: BitGroups, width: int) -> nn.Parameter:
    """Embeddings of the values of all groups, [G * U, width]; replicated over TP."""
    table = nn.Parameter(
        torch.empty(groups.count * groups.values, width, dtype=mcore.params_dtype, device=init_device(mcore))
    )
    setattr(table, PARTIAL, mcore.sequence_parallel)
    return table


class Pairs(nn.Module):
    """What the sum of its groups' embeddings does not say of a token: the products of a second set of embeddings over
    all pairs of groups (a factorization machine: Rendle, ICDM 2010), through a linear map; replicated over TP."""

    def __init__(self, mcore: Any, groups: BitGroups, width: int) -> None:
        super().__init__()
        self.groups = groups
        self.factors = value_table(mcore, groups, 2 * width)
        self.mix = linear(mcore, 2 * width, width)

    def forward(self, index: Tensor) -> Tensor:
        """Values int64 [..., G] to [..., width]."""
        return self.mix(_pair_products(look_up(self.factors, index, self.groups)))

    def expected(self, probability: Tensor) -> Tensor:
        """Probabilities of values [..., G, U] to [..., width], as of independent groups."""
        return self.mix(_pair_products(self.groups.mean(self.factors, probability)))


def make_pairs(config: Config, mcore: Any, groups: BitGroups, width: int) -> Pairs | None:
    """Where `model.names` are pairs."""
    return Pairs(mcore, groups, width) if config.model.pairs else None


def name_of(table: Tensor, pairs: Pairs | None, index: Tensor, groups: BitGroups) -> Tensor:
    """What tokens are called where they enter: values int64 [..., G] to [..., width]."""
    x = look_up(table, index, groups).sum(-2)
    return x if pairs is None else x + pairs(index)


def earlier(x: Tensor) -> Tensor:
    """[..., G, width] to the sum over the groups before each, of the same shape."""
    return x.cumsum(-2) - x


def _pair_products(x: Tensor) -> Tensor:
    """[..., G, width] to the sum over all pairs of groups of their products, scaled to the variance of one."""
    count = x.shape[-2]
    return (x * earlier(x)).sum(-2) * math.sqrt(2.0 / (count * (count - 1)))


def look_up(table: Tensor, index: Tensor, groups: BitGroups) -> Tensor:
    """Values int64 [..., G] to their embeddings [..., G, width]."""
    first = torch.arange(groups.count, device=index.device) * groups.values
    return F.embedding(index + first, table)
