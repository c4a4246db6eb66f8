"""The whole configuration, and what its sections ask of each other."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from megatron_bit.config.data import DataConfig
from megatron_bit.config.diffusion import DiffusionConfig
from megatron_bit.config.model import ModelConfig
from megatron_bit.config.optim import OptimConfig
from megatron_bit.config.parallel import ParallelConfig
from megatron_bit.config.section import Section
from megatron_bit.config.train import (
    CheckpointConfig,
    EvaluateConfig,
    Fp8Config,
    GenerateConfig,
    LogConfig,
    TrainConfig,
)
from megatron_bit.errors import UserError


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
    generate: GenerateConfig = GenerateConfig()
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
        if self.diffusion.levels_apart and not self.model.denoises_groups:
            raise ValueError(
                f"diffusion.levels_apart {self.diffusion.levels_apart} needs model.head.kind diffusion and "
                f"model.group_bits above 1, and they are {self.model.head.kind} and {self.model.group_bits}; set it "
                f"to 0"
            )
        if self.diffusion.noisy_every and not self._sees_noise:
            raise ValueError(
                f"diffusion.noisy_every {self.diffusion.noisy_every} needs model.head.kind chain and diffusion.noise "
                f"lognormal or logistic, and they are {self.model.head.kind} and {self.diffusion.noise}; set it to 0"
            )
        if self.diffusion.self_condition and self.model.head.kind != "diffusion":
            raise ValueError(
                f"diffusion.self_condition {self.diffusion.self_condition} needs a head that denoises, and "
                f"model.head.kind is {self.model.head.kind}; set diffusion.self_condition=0, or "
                "model.head.kind=diffusion"
            )
        if self.generate.guidance != 1.0 and not self.diffusion.condition_drop:
            raise ValueError(
                f"generate.guidance {self.generate.guidance:g} needs diffusion.condition_drop above 0 (0.1 is usual), "
                "and it is 0; set it to 1"
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
    def noise_levels(self) -> int:
        """Noise levels that a diffusion head is told of a token: one for each group of its bits, or one."""
        return len(self.model.group_sizes) if self.diffusion.levels_apart else 1

    @property
    def _sees_noise(self) -> bool:
        """Whether the head is a chain that can learn from noisy blocks."""
        return self.model.head.kind == "chain" and self.diffusion.noise != "entropy_rate"

    @property
    def noisy_every(self) -> int:
        """`diffusion.noisy_every`, resolved: a block of one group has none before it that could be noisy."""
        if self.diffusion.noisy_every is None:
            groups = self.model.block_size * len(self.model.group_sizes)
            return 8 if self._sees_noise and groups > 1 else 0
        return self.diffusion.noisy_every

    @property
    def noisy_share(self) -> float:
        """Of the blocks, those that a chain evaluates once more with noise on what they see."""
        return 1.0 / self.noisy_every if self.noisy_every else 0.0

    @property
    def head_evaluations(self) -> int:
        """How often the head runs for one backbone state in training: noise samples, or stages of the chain."""
        return len(self.model.group_sizes) if self.model.head.kind == "chain" else self.diffusion.noise_samples

    @property
    def exact(self) -> bool:
        """Whether the nats per token are the model's own, and no upper bound of them."""
        return self.model.head.kind != "diffusion"

    @property
    def loss_is_exact(self) -> bool:
        """Whether those nats are the training loss itself."""
        return self.exact and not self.noisy_every

    @property
    def generation(self) -> dict[str, float | int | str]:
        """`generate`, as far as the head knows it: keys of transformers' GenerationConfig that are not its defaults."""
        g = self.generate
        how = {"temperature": g.temperature} if self.model.head.kind == "chain" else {}
        if self.model.head.kind == "diffusion":
            how = {"steps": g.steps, "sampler": g.sampler}
        return {key: value for key, value in {**how, "guidance": g.guidance}.items() if value != 1.0}

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
