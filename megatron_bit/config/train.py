"""`train`, `fp8`, `evaluate`, `generate`, `checkpoint` and `log`: a run and its steps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_bit.config.section import Section


class TrainConfig(Section):
    steps: int = Field(default=1000, ge=1)
    """Optimizer steps of the whole run."""
    stop_at: int | None = Field(default=None, ge=1)
    """Save and stop at this step; the schedule still aims at `steps`. `train.stop_at=null` goes on from there."""
    global_batch_size: int = Field(default=16, ge=1, le=2**24)
    """Samples a step over all ranks."""
    micro_batch_size: int = Field(default=4, ge=1, le=2**24)
    """Samples a forward pass on one data-parallel rank."""
    precision: Literal["fp32", "bf16", "fp8", "fp8_emulated"] = "bf16"
    """bf16 keeps fp32 master weights, moments and gradient accumulation. fp8 is bf16 with the matrix products of layers
    and head in FP8 by Transformer Engine, on a GPU that has it; `fp8_emulated` rounds the same way in plain torch, on
    any device (slow: to look at the numerics). How: section `fp8`."""
    kernels: Literal["auto", "plain", "compiled", "triton"] = "auto"
    """The form of the operations that have several (docs/performance.md): `auto` takes what was the fastest where it
    was measured, on a GPU of this name, and plain elsewhere. `compiled` is torch.compile of the plain form, `triton`
    a kernel of ours, on an NVIDIA GPU. All give the same numbers but for rounding."""
    seed: int = Field(default=1234, ge=0, lt=2**63)
    """Seed of weights, noise and data order."""
    init_from: str | None = None
    """Weights a new run starts with: a run, a checkpoint, a converted folder, or a Hugging Face folder of the Llama
    layout, whose layers become the backbone. A run that has a checkpoint goes on from that."""


class Fp8Config(Section):
    recipe: Literal["current", "delayed", "block", "mxfp8", "nvfp4"] = "current"
    """How a tensor is scaled into the range of FP8: by its largest value now (`current`) or in the last steps
    (`delayed`), in blocks of 128 (`block`); `mxfp8` (blocks of 32) and `nvfp4` need a Blackwell GPU. Products of
    gradients are rounded to E5M2 under `current` and `delayed`, all else to E4M3. nvfp4 is not emulated."""
    amax_history: int = Field(default=1024, ge=1, le=65536)
    """`delayed`: steps whose largest values count. Part of a checkpoint."""
    first_layers_bf16: int = Field(default=0, ge=0)
    """Backbone layers at the beginning that stay bf16."""
    last_layers_bf16: int = Field(default=0, ge=0)
    """Backbone layers at the end that stay bf16."""


class EvaluateConfig(Section):
    every: int = Field(default=0, ge=0)
    """Steps between validations of the likelihood bound; 0 is never."""
    initial: bool = True
    """Also validate before the first step."""
    samples: int = Field(default=32, ge=1, le=2**24)
    """Validation samples; at most what the validation split holds."""
    noise_samples: int = Field(default=16, ge=2, le=4096)
    """Stratified noise levels a hidden state in validation."""


class GenerateConfig(Section):
    """What `generate`, `serve` and a converted folder do with this run's model unless they are told otherwise."""

    steps: int = Field(default=16, ge=2, le=65536)
    """Evaluations of a `diffusion` head a block. A chain has as many as the block has groups of bits."""
    sampler: Literal["ode", "heun", "dpm", "em", "churn"] = "em"
    """How a `diffusion` head takes the noise off: along the probability-flow ODE (`ode`: Euler, `heun`, `dpm`), or with
    fresh noise at every step (`em`: the reverse SDE, `churn`: EDM's). docs/quality.md has what each gives."""
    temperature: float = Field(default=1.0, ge=0, lt=float("inf"))
    """Of a `chain`; 0 takes the likeliest."""
    guidance: float = Field(default=1.0, ge=0, lt=float("inf"))
    """How far to go from the head's answer without the backbone to that with it; above 1 further. Another value than 1
    needs `diffusion.condition_drop`."""


class CheckpointConfig(Section):
    every: int = Field(default=500, ge=1)
    """Steps between checkpoints. The last step and a signal always save."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints to keep; besides them the newest from whose weights a finite loss was computed."""
    keep_every: int = Field(default=0, ge=0)
    """Also keep every checkpoint whose step is a multiple of this; 0 keeps none for it."""
    background: bool = True
    """Write while training goes on, which waits only for the copy out of the device. The last save is waited for."""
    initial: bool = False
    """Also save the untrained model, as step 0; it is never deleted."""
    mirror: str = ""
    """A URL (what fsspec reads: s3://bucket/run, gs://..., file:///...) that every checkpoint is copied to in the
    background, and from which a start fetches the newest if the run folder has none as new. One URL for each run.
    Copies are kept as `keep` and `keep_every` say; at the end the newest has to be there."""


class LogConfig(Section):
    every: int = Field(default=10, ge=1)
    """Steps between progress lines; the JSON-lines log has a record for every step."""
    to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where losses, rates, MFU, memory and validations are shown as well: `tensorboard` in RUN/tensorboard; `wandb` and
    `mlflow` as their own environment variables say (docs/tracking.md). `[]`: nowhere but in the run's own logs."""
