"""The loss-spike guard: refuses an update whose loss is far above the running mean."""

from __future__ import annotations

from megatron_bit.run.state import TrainState

WARM_UP = 20  # steps before the mean is trusted
MEMORY = 0.98  # weight of the past in the mean


def accept(loss: float, state: TrainState, factor: float) -> bool:
    """Whether to apply this step's update; also moves the running mean (only by accepted losses).

    Args:
        loss: the global batch's loss, the same on every rank.
        factor: `optim.spike_guard`.
    """
    finite = loss == loss and abs(loss) != float("inf")
    if not finite or (state.step >= WARM_UP and loss > factor * state.loss_mean):
        return False
    weight = min(MEMORY, state.step / (state.step + 1))
    state.loss_mean = weight * state.loss_mean + (1.0 - weight) * loss
    return True
