"""Cross-entropy over the values of groups of bits: what a chain head's loss is."""

from __future__ import annotations

from torch import Tensor

from mbit_kernels.matched_filter import at_least_float32


def group_cross_entropy(logits: Tensor, index: Tensor, invalid: Tensor | None) -> Tensor:
    """-ln p of each group's value, p the softmax over its valid values.

    Args:
        logits: float [..., G, U].
        index: int64 [..., G], the values.
        invalid: bool [G, U], values that a group does not have; None: all have U.

    Returns:
        float32 [..., G], nats.
    """
    logits = at_least_float32(logits)
    if invalid is not None:
        logits = logits.masked_fill(invalid, float("-inf"))
    return -logits.log_softmax(-1).gather(-1, index[..., None]).squeeze(-1)
