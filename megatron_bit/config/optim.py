"""`optim`: AdamW, its schedule, and what is done about updates that are no good."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_bit.config.section import Section

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate of AdamW."""
    head_lr_scale: float = Field(default=1.0, gt=0)
    """The head's learning rate is lr times this."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's exponential decay rates."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decay of matrices; vectors (norms, biases) and learned positions are not decayed."""
    grad_clip: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 does not clip."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Cosine, or warm-up, stable, decay."""
    warmup_steps: int = Field(default=100, ge=0)
    """Linear warm-up from 0."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """`wsd`: share of `train.steps` in the final linear decay."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate over the peak."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Keep an fp32 average of the weights, of which an update leaves this share; 0 keeps none. Sharded and saved like
    them (4 bytes a parameter more), for `convert --weights ema` and `generate --weights ema`; training does not see it.
    A run that turns it on later begins with its weights."""
    spike_guard: float = Field(default=0.0, ge=0)
    """Skip an update whose loss is above this many times the running mean; 0 is off. Costs a host sync a step."""
    max_skipped: int = Field(default=10, ge=0)
    """Updates in a row that are skipped, or whose loss is no number, after which the run has diverged; 0: it never has.
    Saves wait while updates are skipped, and the newest checkpoint that a finite loss was computed from is not
    pruned."""
    on_divergence: Literal["stop", "rewind"] = "stop"
    """`stop`: with exit code 86 and a line that names that checkpoint. `rewind`: go on from it, behind the data that
    was seen since."""
    max_rewinds: int = Field(default=3, ge=1)
    """`rewind`: as often in the whole run, whatever ends and continues it; then it stops."""
