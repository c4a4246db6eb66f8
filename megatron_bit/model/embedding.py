"""The input: bits -> width, shifted by one block behind K learned start vectors."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bit.config import Config
from megatron_bit.diffusion.bit_groups import BitGroups
from megatron_bit.model.layers import (
    RMSNorm,
    fp8_linear,
    init_device,
    linear,
    make_pairs,
    mark_partial,
    name_of,
    value_table,
)
from megatron_bit.model.memory import make_memory


class BitEmbedding(nn.Module):
    """Bits of the previous block in, hidden states out: through an MLP, or as the name that `model.names` gives their
    groups, and with what `model.memory` has of the n-grams that end there.

    The weights are replicated over TP, but for those of `memory`. Under sequence parallelism every rank embeds its own
    part of the sequence, which costs each rank 1/tp of the work and needs no communication in the forward pass.
    """

    def __init__(self, config: Config, mcore: Any, tp_group: dist.ProcessGroup, groups: BitGroups) -> None:
        super().__init__()
        m = config.model
        self.groups = groups
        self.block_size = m.block_size
        self.start = nn.Parameter(
            torch.empty(m.block_size, m.hidden_size, dtype=mcore.params_dtype, device=init_device(mcore))
        )
        if m.group_bits == 1:
            self.fc1 = linear(mcore, m.bits, m.hidden_size)
            self.fc2 = fp8_linear(mcore, m.hidden_size, m.hidden_size)
        else:
            self.values = value_table(mcore, groups, m.hidden_size)
        self.pairs = make_pairs(config, mcore, groups, m.hidden_size)
        self.norm = RMSNorm(mcore, m.hidden_size, m.norm_eps)
        mark_partial(self, mcore.sequence_parallel)
        self.memory = make_memory(config, mcore, tp_group, m.hidden_size)

    def forward(
        self, bits: Tensor, first_position: int, document_start: Tensor | None = None, remembered: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            bits: int8 [s, b, B], the bits at the *input* positions: position p holds token p - K, anything for p < K.
            first_position: position of the first row in the whole sequence.
            document_start: int64 [s, b], the position where each row's document begins; None: all at 0.
            remembered: [s, b, D], what `memory` has of the tokens.

        Returns:
            [s, b, D].
        """
        x = self._embed(bits)
        x = self.norm(x if remembered is None else x + remembered)
        position = torch.arange(first_position, first_position + bits.shape[0], device=bits.device)
        position = position[:, None] if document_start is None else position[:, None] - document_start
        start = self.start[position.clamp(max=self.block_size - 1)]
        return torch.where((position < self.block_size)[..., None], start, x)

    def _embed(self, bits: Tensor) -> Tensor:
        if hasattr(self, "values"):
            return name_of(self.values, self.pairs, self.groups.index(bits), self.groups)
        return self.fc2(F.silu(self.fc1(bits.to(self.fc1.weight.dtype))))
