"""A plain GPTModel of megatron-core, of the shape of a softmax model here: what `bench train` compares with."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from megatron_bit.config import Config
from megatron_bit.errors import UserError
from megatron_bit.model.backbone import transformer_config
from megatron_bit.model.chunk import LossOutput, TokenBatch
from megatron_bit.model.memory import make_memory
from megatron_bit.parallel.groups import Groups


def with_transformer_engine() -> bool:
    """Whether the peer has Transformer Engine's layers: looked for only where there is a GPU, as importing it fails."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


class GPTPeer(nn.Module):
    """GPTModel in its own layer spec and with its own loss, called as our models are; untied, with RoPE and SwiGLU.

    With `model.memory.rows` its input has the same memory as a softmax model's here.
    """

    def __init__(self, config: Config, groups: Groups) -> None:
        """UserError if the precision needs Transformer Engine and there is none."""
        super().__init__()
        from megatron.core.models.gpt import gpt_layer_specs
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.transformer.torch_norm import WrappedTorchNorm
        from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

        m, engine = config.model, with_transformer_engine()
        if config.fp8_products and (not engine or config.train.precision == "fp8_emulated"):
            raise UserError(f"GPTModel does not have train.precision {config.train.precision}; it has fp8 on a GPU")
        ours = transformer_config(config, groups)
        mcore: Any = dataclasses.replace(
            ours,
            use_te_activation_func=False,
            perform_initialization=True,
            bias_activation_fusion=torch.cuda.is_available(),
            bias_dropout_fusion=torch.cuda.is_available(),
        )
        mcore.linears = ours.linears  # a step's FP8 around Transformer Engine's layers is the same for both
        self.config = mcore
        specs: Any = gpt_layer_specs
        norm: Any = WrappedTorchNorm
        spec: Any
        if engine:
            spec = specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=m.qk_norm)
        else:
            layer = specs.get_gpt_layer_local_spec(qk_layernorm=m.qk_norm, normalization="RMSNorm")
            # or the last norm would be Transformer Engine's wherever that is installed, which is for GPUs alone
            spec = TransformerBlockSubmodules(layer_specs=[layer] * m.num_layers, layer_norm=norm)
        self.model = GPTModel(
            mcore,
            spec,
            vocab_size=m.padded_vocab_size,
            max_sequence_length=config.data.seq_length,
            position_embedding_type="rope",
            rotary_base=round(m.rope_base),
            pg_collection=groups.collection,
        ).to(groups.device, mcore.params_dtype)  # all of it, as Megatron's Float16Module makes it
        self.memory = make_memory(config, mcore, groups.tp, m.hidden_size)
        self.mask: Tensor | None = None  # causal by the spec
        if not engine:  # whose plain attention wants it, and would make its own on CUDA wherever it runs
            length = config.data.seq_length
            whole = torch.ones(1, 1, length, length, dtype=torch.bool, device=groups.device)
            self.mask = whole.triu(1)

    def forward(self, batch: TokenBatch) -> LossOutput:
        ids = batch.tokens.roll(1, 1)  # position p holds token p - 1: as much work as any other first token
        position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        mask: Any = self.mask
        embedded: Tensor | None = None
        if self.memory is not None:
            embedded = self.model.embedding(ids, position) + self.memory.of_ids(ids, None)
        nats: Tensor = self.model(ids, position, mask, decoder_input=embedded, labels=batch.tokens)
        loss = nats.mean()
        return LossOutput(loss, torch.stack((loss.detach(), loss.detach())))
