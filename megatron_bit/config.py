"""The configuration: one typed, frozen tree. Imports no torch, so that every command can validate quickly.

Layers, later wins: defaults < preset < YAML file < ``key=value`` on the command line.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_bit.errors import UserError
from megatron_bit.paths import user_location


class Section(BaseModel):
    """A frozen group of settings; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class HeadConfig(Section):
    kind: Literal["diffusion", "chain", "softmax"] = "diffusion"
    """`diffusion` takes the noise off all bits of a block together. `chain` decides a block's tokens one after
    another, and a token's groups of bits (`model.group_bits`) one after another: the likelihood is exact, and of
    `diffusion` only `context_noise` and `condition_drop` have an effect, `evaluate.noise_samples` none. `softmax` is
    the autoregressive peer to compare with: a token table, and a softmax over the vocabulary, both untied and split
    over `parallel.tp`; it needs `model.block_size=1`, and what is said below of the head, of bits and of noise then
    has no effect."""
    window: int = Field(default=8, ge=1)
    """Tokens, its own among them, that a token of a chain head's attention reaches back to, also across blocks."""
    prior: bool = True
    """Add to the head's logits a linear map of the backbone's states, the same at every noise level."""
    num_layers: int = Field(default=2, ge=1)
    """Layers of the head, a light transformer over the K tokens of one block."""
    hidden_size: int = Field(default=256, ge=8)
    """Width of the head."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads of the head; divisible by `parallel.tp`."""
    ffn_hidden_size: int = Field(default=640, ge=8)
    """SwiGLU width of the head; divisible by `parallel.tp`."""

    @model_validator(mode="after")
    def _check(self) -> HeadConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} has to be a multiple of num_heads {self.num_heads}")
        if self.kind == "chain" and (self.hidden_size // self.num_heads) % 2:
            raise ValueError(f"hidden_size / num_heads = {self.hidden_size // self.num_heads} has to be even for RoPE")
        return self


class ModelConfig(Section):
    bits: int = Field(default=16, ge=1, le=256)
    """Bits of one token, B, at most 62 of tokens with an id. The vocabulary of the data has to fit: V <= 2^B."""
    code: Literal["binary", "gray", "random", "semantic", "raw"] = "binary"
    """How a token id becomes bits: the id itself, its Gray code, a seeded permutation (the negative control), or a code
    learned from the text of `data.path` (`megatron-bit codes DATA`), which makes bits cheaper to decide apart. `raw`:
    tokens are records of B bits (`prepare --raw-bits B`), which have neither ids nor a vocabulary."""
    group_bits: int = Field(default=1, ge=1, le=10)
    """Bits decided together, g: the groups of a token's bits are as even as they can be, and have 2^g values. 1: every
    bit by itself; B: a softmax over all codes. Above 1 bits enter the model as embeddings of their groups' values."""
    vocab_size: int | None = Field(default=None, ge=1)
    """Tokens of the vocabulary, V. The data says it, and has to agree if it is set; a softmax head planned without
    data (`--dry-run`) needs it."""
    block_size: int = Field(default=4, ge=1, le=64)
    """Tokens generated at once, K."""
    attention: Literal["causal", "block_causal"] = "causal"
    """Inside a block of the backbone: causal (the state of a block's first token has seen only the first token of
    the block before; the head, which sees all K states, makes up for it), or every token sees its whole block."""
    num_layers: int = Field(default=6, ge=1)
    """Layers of the backbone."""
    hidden_size: int = Field(default=256, ge=8)
    """Width of the backbone, D."""
    num_heads: int = Field(default=4, ge=1)
    """Query heads; divisible by `parallel.tp`."""
    num_kv_heads: int = Field(default=2, ge=1)
    """Key/value heads (grouped-query attention); divisible by `parallel.tp`."""
    head_dim: int | None = Field(default=None, ge=2)
    """Width of an attention head of the backbone; without one `hidden_size` / `num_heads`."""
    ffn_hidden_size: int = Field(default=640, ge=8)
    """SwiGLU width; divisible by `parallel.tp`."""
    qk_norm: bool = True
    """RMSNorm on queries and keys."""
    rope_base: float = Field(default=10_000.0, gt=1)
    """Base of the rotary position embedding."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Epsilon of the RMSNorms with a learned scale."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""
    head: HeadConfig = HeadConfig()

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.code == "raw":
            if self.head.kind == "softmax" or self.vocab_size is not None:
                what = "head.kind softmax" if self.head.kind == "softmax" else f"vocab_size {self.vocab_size}"
                raise ValueError(f"{what} needs a vocabulary, and code raw has none; leave out one of the two")
        elif self.bits > 62:
            raise ValueError(f"bits {self.bits} is more than the 62 of a token id; only code=raw has up to 256")
        if self.group_bits > self.bits:
            raise ValueError(f"group_bits {self.group_bits} is more than the bits {self.bits} of a token")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} has to be a multiple of num_heads {self.num_heads}, or head_dim be set"
            )
        if self.attention_head_dim % 2:
            name = "hidden_size / num_heads =" if self.head_dim is None else "head_dim"
            raise ValueError(f"{name} {self.attention_head_dim} has to be even for RoPE")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} has to be a multiple of num_kv_heads {self.num_kv_heads}")
        return self

    @property
    def attention_head_dim(self) -> int:
        """`head_dim`, resolved."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def query_width(self) -> int:
        """Channels of all query heads, and of what they attend to."""
        return self.num_heads * self.attention_head_dim

    @property
    def kv_width(self) -> int:
        """Channels of all key heads, and of all value heads."""
        return self.num_kv_heads * self.attention_head_dim

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Bits of each group, the larger ones first: 12 bits by 8 are (6, 6), 15 by 8 are (8, 7)."""
        count = -(-self.bits // self.group_bits)
        size, larger = divmod(self.bits, count)
        return (size + 1,) * larger + (size,) * (count - larger)

    @property
    def group_values(self) -> int:
        """Values of all groups together, G * U, with room for the largest group's in each: rows of their tables."""
        return len(self.group_sizes) * 2 ** self.group_sizes[0]

    @property
    def head_outputs(self) -> int:
        """Outputs of the head for one token: a logit for every value of every group, or for every single bit."""
        return self.bits if self.group_bits == 1 and self.head.kind == "diffusion" else self.group_values

    @property
    def padded_vocab_size(self) -> int:
        """Rows of a softmax model's token table and projection: a function of V alone, so that any layout has them."""
        assert self.vocab_size is not None, "the vocabulary is not known yet"
        return -(-self.vocab_size // 128) * 128


class DiffusionConfig(Section):
    loss: Literal["auto", "mse", "bce"] = "auto"
    """Squared error of the posterior mean with the EDM weight, or cross-entropy of the bits (with `model.group_bits`
    above 1: of the groups' values). `auto`: mse with group_bits=1, else bce."""
    parameterization: Literal["matched_filter", "direct"] = "matched_filter"
    """`matched_filter` adds to the head's logits what the noisy bits tell by themselves, which is known exactly;
    `direct` leaves it to the head."""
    noise_samples: int = Field(default=4, ge=1, le=4096)
    """Independent noise levels that share one backbone state (stratified)."""
    sigma_min: float = Field(default=0.1, gt=0)
    """Smallest noise level (on bits of -1, +1)."""
    sigma_max: float = Field(default=160.0, gt=0)
    """Largest noise level."""
    noise: Literal["lognormal", "logistic", "entropy_rate"] = "lognormal"
    """Which noise levels are trained at: ln(sigma / 2) normal or logistic, truncated to the range above, or as many as
    the bits that are decided there: the measured error / sigma^2 in 128 bins of ln sigma makes the density, which is
    also the sampler's grid. The table of it is part of a checkpoint."""
    noise_warmup: int = Field(default=200, ge=0)
    """`entropy_rate`: steps of log-normal levels before the measured density is blended in, over as many again."""
    log_mean: float = -1.2
    """Mean of ln(sigma / 2) in training."""
    log_std: float = Field(default=1.2, gt=0)
    """Standard deviation of ln(sigma / 2) in training; of `logistic`, the scale."""

    context_noise: float = Field(default=0.0, ge=0, le=1)
    """In training each bit that enters the backbone is flipped with this probability times a number of its sample's,
    uniform in (0, 1); what is predicted stays clean. Of chain heads too."""
    condition_drop: float = Field(default=0.0, ge=0, lt=1)
    """In training the head does without the backbone with this probability, each block of a sample by itself, and so
    learns the unconditional answer that `generate --guidance` steers away from. The training loss counts such blocks,
    validation has none. Of chain heads too; their view of the newest tokens stays."""
    self_condition: float = Field(default=0.0, ge=0, le=1)
    """Above 0, a `diffusion` head has one more input: its own estimate of the clean bits (Analog Bits, 2208.04202). In
    training a first evaluation without gradients makes it, and it is shown to this share of the evaluations that
    learn, each noise level of a block by itself (0.5 is usual). Validation always shows it; in generation it is the
    estimate of the step before. Training pays a forward pass of the head more, validation an evaluation."""

    @model_validator(mode="after")
    def _check(self) -> DiffusionConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} has to be smaller than sigma_max {self.sigma_max}")
        low, high = ((math.log(s / 2) - self.log_mean) / self.log_std for s in (self.sigma_min, self.sigma_max))
        if self.noise == "logistic":
            mass = 0.5 * (math.tanh(0.5 * high) - math.tanh(0.5 * low))
        else:
            mass = 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
        if mass < 0.05:
            raise ValueError(
                f"log_mean {self.log_mean} and log_std {self.log_std} put {100 * mass:.2g} % of the noise between "
                f"sigma_min {self.sigma_min} and sigma_max {self.sigma_max}; bring log_mean closer to "
                f"{math.log(math.sqrt(self.sigma_min * self.sigma_max) / 2):.2f}"
            )
        return self


class ParallelConfig(Section):
    tp: int = Field(default=1, ge=1)
    """Tensor-parallel size."""
    pp: int = Field(default=1, ge=1)
    """Pipeline-parallel size. The data-parallel size is what remains: world size / (tp * pp)."""
    vpp: int = Field(default=1, ge=1)
    """Model chunks a pipeline rank; above 1 the schedule is interleaved 1F1B."""
    sequence_parallel: bool = True
    """With tp > 1: shard the activations between tensor-parallel regions along the sequence."""
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """ZeRO stage of the optimizer; 0 shards nothing and needs no DeepSpeed. Stages 2 and 3 need pp = 1.
    `auto`: 1 with several data-parallel ranks, 0 with one."""
    recompute: Literal["none", "head", "full"] = "none"
    """What is computed again in the backward pass instead of kept. `head`: the whole head, one noise sample (of a
    chain: one stage) at a time, so that it needs the memory of one. `full`: the head in the same way, and all of a
    backbone layer but its input."""
    timeout_minutes: float = Field(default=10.0, gt=0)
    """How long a collective may wait for another rank before the job is given up."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.pp > 1 and self.zero_stage in (2, 3):
            raise ValueError(
                f"zero_stage {self.zero_stage} with pp {self.pp} is not possible: DeepSpeed shards gradients in its "
                "own backward, which a pipeline schedule replaces; use zero_stage=1, or pp=1"
            )
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"vpp {self.vpp} needs pp > 1; use vpp=1, or pp=2 and more")
        return self


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


Verify = Literal["first", "always", "never"]


class RemoteConfig(Section):
    cache: str = ""
    """Folder on the node's own disk for shards that were fetched; its processes share it. Without a name
    ~/.cache/megatron_bit."""
    cache_gib: float = Field(default=50.0, gt=0)
    """Size of the cache; what was not used for longest goes first."""
    attempts: int = Field(default=6, ge=1)
    """How often a file is asked for before the run ends, with growing pauses."""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """An attempt is given up when nothing has come for this long."""
    workers: int = Field(default=4, ge=1)
    """Shards fetched at a time, ahead of need: those of this window and the next."""


class SourceConfig(Section):
    path: str = Field(min_length=1)
    """As `data.path`."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the samples, relative to the other sources'."""
    epochs: float | None = Field(default=None, gt=0)
    """Share of the samples: this many times all that the source has."""


class DataConfig(Section):
    path: str = ""
    """Folder written by `megatron-bit prepare` (it holds manifest.json), or where there is one: a URL that fsspec reads
    (https://, s3://, gs://), or `pipe:COMMAND {file}`, a command that writes a file of it to its output."""
    sources: tuple[SourceConfig, ...] = ()
    """Several folders of one tokenizer instead of `data.path`: `[{path: wiki, weight: 2}, {path: code, weight: 1}]`.
    `weight` is a share of the samples; `epochs` instead says how often a source is gone through while the others are
    gone through as often as theirs say; without either each has the share of its size."""
    temperature: float = Field(default=1.0, gt=0)
    """Of `data.sources` without weight or epochs: shares are sizes to the power of 1 / temperature."""
    seq_length: int = Field(default=256, ge=2)
    """Tokens of one sample; a multiple of `model.block_size`."""
    shuffle_shards: int = Field(default=8, ge=1)
    """Samples are shuffled within windows of this many shards; a window is what a rank holds in memory."""
    document_boundaries: Literal["ignore", "positions", "mask"] = "ignore"
    """Between the documents of a sample: nothing; `positions` begins the backbone's rotary positions anew; `mask` also
    hides every other document from a token, in the backbone and in the head (needs `data.align_blocks`)."""
    align_blocks: bool = False
    """Let a document begin with a block of `model.block_size` tokens: the rest of its last block is filled with the
    end-of-document token, which counts as text."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a shard that cannot be had or read: `stop` says which and where; `skip` replaces its samples by others of its
    window from there on, the same on every rank, and counts them. More than a tenth of the shards always stop."""
    verify: Verify = "first"
    """When a shard is hashed while it is read, to be the manifest's: the `first` time that a process reads it after a
    start, `always`, or `never`. Another SHA-256 is damage (`data.on_error`); a copy in the cache is thrown away
    and fetched again, once. With `never`, a changed token that is in the vocabulary is trained on."""
    prefetch: int = Field(default=2, ge=1)
    """Global batches read ahead."""
    remote: RemoteConfig = RemoteConfig()

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.path and self.sources:
            raise ValueError(f"path {self.path!r} and sources are both set; leave out one of them")
        for name in ("weight", "epochs"):
            given = [getattr(source, name) is not None for source in self.sources]
            if any(given) and not all(given):
                raise ValueError(f"{name} is set for {sum(given)} of {len(given)} sources; set it for all or for none")
        told = [source for source in self.sources if source.weight is not None or source.epochs is not None]
        if told and told[0].weight is not None and told[0].epochs is not None:
            raise ValueError("sources have both weight and epochs; give one of them")
        if self.temperature != 1 and (told or len(self.sources) < 2):
            raise ValueError(
                f"temperature {self.temperature} is for several sources without weight or epochs; leave it out"
            )
        return self

    @property
    def folders(self) -> tuple[str, ...]:
        """Every data folder; the first one's tokenizer and codes are the run's."""
        return tuple(source.path for source in self.sources) or (self.path,)

    def check_set(self) -> None:
        """UserError if there is no data folder."""
        if not self.folders[0]:
            raise UserError(
                "data.path is not set; make a folder with `megatron-bit prepare INPUT --out DIR`, then data.path=DIR"
            )


class TrainConfig(Section):
    steps: int = Field(default=1000, ge=1)
    """Optimizer steps of the whole run."""
    stop_at: int | None = Field(default=None, ge=1)
    """Save and stop at this step; the schedule still aims at `steps`. `train.stop_at=null` goes on from there."""
    global_batch_size: int = Field(default=16, ge=1)
    """Samples a step over all ranks."""
    micro_batch_size: int = Field(default=4, ge=1)
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
    samples: int = Field(default=32, ge=1)
    """Validation samples; at most what the validation split holds."""
    noise_samples: int = Field(default=16, ge=2, le=4096)
    """Stratified noise levels a hidden state in validation."""


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
    tensorboard: bool = True
    """Write tensorboard scalars, with tokens on the x axis."""


class Config(Section):
    run: str = "runs/default"
    """The run folder: configuration, checkpoints, logs. A folder that already has a run is continued."""
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    fp8: Fp8Config = Fp8Config()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        k, s = self.model.block_size, self.data.seq_length
        if self.model.head.kind == "softmax" and k != 1:
            raise ValueError(
                f"model.head.kind softmax predicts one token at a time, and model.block_size is {k}; set "
                "model.block_size=1"
            )
        if self.diffusion.self_condition and self.model.head.kind != "diffusion":
            raise ValueError(
                f"diffusion.self_condition {self.diffusion.self_condition} needs a head that denoises, and "
                f"model.head.kind is {self.model.head.kind}; set diffusion.self_condition=0, or "
                "model.head.kind=diffusion"
            )
        if s % k:
            down = max(s // k, 1) * k
            raise ValueError(
                f"data.seq_length {s} has to be a multiple of model.block_size {k}; use {down} or {down + k}"
            )
        if self.data.document_boundaries == "mask" and k > 1 and not self.data.align_blocks:
            raise ValueError(
                f"data.document_boundaries mask needs data.align_blocks=true with model.block_size {k}: the tokens of "
                "a block are decided together, so a block of two documents would show them to each other"
            )
        if self.train.stop_at is not None and self.train.stop_at > self.train.steps:
            raise ValueError(f"train.stop_at {self.train.stop_at} is beyond train.steps {self.train.steps}")
        if self.train.global_batch_size % self.train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size {self.train.global_batch_size} has to be a multiple of "
                f"train.micro_batch_size {self.train.micro_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _check_fp8(self) -> Config:
        told, layers = self.fp8.model_fields_set, self.fp8.first_layers_bf16 + self.fp8.last_layers_bf16
        changed = [key for key in sorted(told) if getattr(self.fp8, key) != Fp8Config.model_fields[key].default]
        if changed and not self.fp8_products:
            raise ValueError(
                f"fp8.{changed[0]} {getattr(self.fp8, changed[0])} has no use with train.precision "
                f"{self.train.precision}; leave it out, or set train.precision=fp8"
            )
        if "amax_history" in changed and self.fp8.recipe != "delayed":
            raise ValueError(
                f"fp8.amax_history {self.fp8.amax_history} is for fp8.recipe delayed, and it is {self.fp8.recipe}"
            )
        if layers > self.model.num_layers:
            raise ValueError(
                f"fp8.first_layers_bf16 + fp8.last_layers_bf16 = {layers} is more than model.num_layers "
                f"{self.model.num_layers}"
            )
        if self.train.precision == "fp8_emulated" and self.fp8.recipe == "nvfp4":
            raise ValueError("fp8.recipe nvfp4 is not emulated; use current, delayed, block or mxfp8")
        return self

    @property
    def bf16(self) -> bool:
        """Whether weights and activations are bfloat16; with FP8, outside its matrix products."""
        return self.train.precision != "fp32"

    @property
    def fp8_products(self) -> bool:
        """Whether matrix products are in FP8, real or emulated."""
        return self.train.precision in ("fp8", "fp8_emulated")

    @property
    def recompute_head(self) -> bool:
        """Whether the head's evaluations are made one by one, and again in the backward pass; not of a softmax head."""
        return self.parallel.recompute in ("head", "full") and self.model.head.kind != "softmax"

    @property
    def head_evaluations(self) -> int:
        """How often the head runs for one backbone state in training: noise samples, or stages of the chain."""
        return len(self.model.group_sizes) if self.model.head.kind == "chain" else self.diffusion.noise_samples

    @property
    def start_blocks(self) -> int | None:
        """Tokens of the blocks in which batches say where documents begin; None: nothing asks for it."""
        return None if self.data.document_boundaries == "ignore" else self.model.block_size

    @property
    def loss(self) -> Literal["mse", "bce"]:
        """`diffusion.loss`, resolved."""
        if self.diffusion.loss != "auto":
            return self.diffusion.loss
        return "mse" if self.model.group_bits == 1 else "bce"

    def with_vocab_size(self, size: int) -> Config:
        """This configuration with the data's vocabulary, 0 for raw records; UserError if it was told of another one."""
        if size == 0:
            return self
        told = self.model.vocab_size
        if told not in (None, size):
            raise UserError(
                f"model.vocab_size is {told}, and the data has a vocabulary of {size} tokens; leave it out, or set "
                f"model.vocab_size={size}"
            )
        return self.model_copy(update={"model": self.model.model_copy(update={"vocab_size": size})})


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(
        p.name[: -len(".yaml")] for p in resources.files("megatron_bit.presets").iterdir() if p.name.endswith(".yaml")
    )


def leaves(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the tree as (dotted name, pydantic field)."""
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from leaves(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    preset: str | None = None,
    given: tuple[str, dict[str, Any]] | None = None,
) -> Config:
    """Merge the layers and validate.

    A YAML file may itself name a `preset`. `given` is one more layer, above the preset: what it is, and its tree.
    Paths are taken as users write them (paths.py) in the file and in overrides, and as they stand in `given`.
    Raises UserError with one line: key, value, where it was set, what to do.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    if path is not None:
        instead = f"give a YAML file, or --preset {'|'.join(preset_names())}"
        tree = read_yaml(Path(path), "configuration", instead)
        named = tree.pop("preset", None)
        preset = preset or named
        layers.append((str(path), _expanded(tree, str(path))))
    if preset is not None:
        if preset not in preset_names():
            raise UserError(f"preset {preset!r} does not exist; choose one of {', '.join(preset_names())}")
        text = resources.files("megatron_bit.presets").joinpath(f"{preset}.yaml").read_text()
        layers.insert(0, (f"preset {preset}", yaml.safe_load(text)))
    if given is not None:
        layers.insert(preset is not None, given)
    layers.extend(("command line", _expanded(_parse_override(item), "command line")) for item in overrides)
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, tree in layers:
        _merge(merged, tree, source, origin)
    return config_from_dict(merged, origin)


def config_from_dict(tree: Mapping[str, Any], origin: Mapping[str, str] | None = None) -> Config:
    """Validate a plain tree; UserError with one line on the first thing that is wrong."""
    return validated(Config, tree, origin or {})


S = TypeVar("S", bound=Section)


def validated(section: type[S], tree: Mapping[str, Any], origin: Mapping[str, str], prefix: str = "") -> S:
    """`tree` as a `section`, whose keys a message shows behind `prefix`; UserError on the first thing that is wrong.

    Args:
        origin: where the dotted keys were set.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        problems = error.errors()
        first = problems[0]
        key = ".".join(str(part) for part in first["loc"])
        source = _origin(key, origin)
        message = first["msg"].removeprefix("Value error, ")
        value = first.get("input")
        if first["type"] == "value_error":  # a check between keys: the message names them
            where = f"{prefix}{key}: " if key else ""
            text = f"{where}{message}"
        elif first["type"] == "extra_forbidden":
            names = [name for name, _ in leaves(section)]
            close = difflib.get_close_matches(key, names, n=1) or names
            where = f" ({source})" if source else ""
            text = f"{prefix}{key}{where} is no key here; did you mean {' or '.join(prefix + name for name in close)}?"
        else:
            where = f" ({source})" if source else ""
            # the value may be of any size: YAML can name a part of itself again and again
            shown = repr(value) if isinstance(value, str | int | float | None) else reprlib.repr(value)
            text = f"{prefix}{key} = {shown[:200]}{where}: {message[:1].lower()}{message[1:]}"
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(text + more) from None


def to_yaml(config: Config) -> str:
    """The resolved tree as YAML; `load_config` reads it back to the same tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


MOST_YAML_BYTES = 2**20


class _UniqueKeys(yaml.constructor.BaseConstructor):
    """Refuses a key that is given twice; YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            try:
                hash(key)
            except TypeError:
                raise yaml.constructor.ConstructorError(None, None, "a key is no text", key_node.start_mark) from None
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class SafeYaml(_UniqueKeys, yaml.SafeLoader):
    """Numbers are numbers, true is true."""


class TextYaml(_UniqueKeys, yaml.BaseLoader):
    """Every value is the text that stands there."""


def read_yaml(
    path: Path, what: str, instead: str, loader: type[SafeYaml] | type[TextYaml] = SafeYaml
) -> dict[str, Any]:
    """The mapping in a YAML file; UserError, which calls it `what`, and says `instead` if it does not exist."""
    try:
        if path.stat().st_size > MOST_YAML_BYTES:
            raise UserError(f"{what} {path} has over {MOST_YAML_BYTES:,} bytes, which none has; {instead}")
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)  # both are safe
    except RecursionError:
        raise UserError(f"{what} {path} is not valid YAML: nested too deeply") from None
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist; {instead}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as error:  # 2001-99-99, !!int x
        raise UserError(f"{what} {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not tree:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{what} {path} has to be a mapping of keys, not {type(tree).__name__}")
    return tree


# keys that are a path, or a URL
PATHS = ("run", "data.path", "data.sources", "data.remote.cache", "train.init_from", "checkpoint.mirror")


def _expanded(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """The tree with its paths as the user means them. What is not text is left to the validation."""

    def place(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [{**one, "path": place(key, one.get("path"))} if isinstance(one, dict) else one for one in value]
        if not isinstance(value, str):
            return value
        try:
            value.encode()
            return user_location(value)
        except UnicodeEncodeError:  # safetensors opens no file below it: a run there could not be continued
            raise UserError(f"{key} = {value} ({source}): the name is no UTF-8; rename the folder") from None
        except UserError as error:
            raise UserError(f"{key} = {value} ({source}): {error}") from None

    def walk(node: dict[str, Any], prefix: str) -> dict[str, Any]:
        out = {}
        for name, value in node.items():
            key = f"{prefix}{name}"
            out[name] = walk(value, f"{key}.") if isinstance(value, dict) else value
            if key in PATHS:
                out[name] = place(key, value)
        return out

    return walk(tree, "")


def _parse_override(item: str) -> dict[str, Any]:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise UserError(f"{item!r} is not key=value; write for example train.steps=2000")
    field = dict(leaves()).get(key)
    try:
        value = text if field is not None and field.annotation is str else yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, AttributeError, OverflowError):
        value = text
    first, *rest = key.split(".")
    for part in reversed(rest):
        value = {part: value}
    return {first: value}


def _origin(key: str, origin: Mapping[str, str]) -> str:
    """Where a key was set; an element of a list was set where the list was."""
    while key:
        if key in origin:
            return origin[key]
        key = key.rpartition(".")[0]
    return ""


def _merge(into: dict[str, Any], tree: Mapping[str, Any], source: str, origin: dict[str, str]) -> None:
    def walk(target: dict[str, Any], node: Mapping[Any, Any], section: type[Section], prefix: str) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            field = section.model_fields.get(str(name))
            if field is None:
                while isinstance(value, Mapping) and len(value) == 1:  # the whole dotted key, as it was written
                    inner, value = next(iter(value.items()))
                    key = f"{key}.{inner}"
                raise UserError(f"{key} ({source}) is not a configuration key; {_suggest(key)}")
            origin[key] = source
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                if not isinstance(value, Mapping):
                    raise UserError(
                        f"{key} = {value!r} ({source}) is a section; set its keys, such as "
                        f"{key}.{next(iter(field.annotation.model_fields))}=..."
                    )
                walk(target.setdefault(name, {}), value, field.annotation, f"{key}.")
            else:
                target[name] = value

    walk(into, tree, Config, "")


def _suggest(key: str) -> str:
    names = [name for name, _ in leaves()]
    suffix = f".{key}"
    close = [name for name in names if name.endswith(suffix)]  # the right key without its section
    close = close or difflib.get_close_matches(key, names, n=1, cutoff=0.8)
    tail = key.rpartition(".")[2]
    close = close or [name for name in names if name.rpartition(".")[2] == tail]  # in the wrong section
    close = close or difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if not close:
        by_leaf = {name.rpartition(".")[2]: name for name in names}
        close = [by_leaf[m] for m in difflib.get_close_matches(tail, list(by_leaf), n=1, cutoff=0.6)]
    return f"did you mean {' or '.join(close[:4])}?" if close else "`megatron-bit config` lists them all"
