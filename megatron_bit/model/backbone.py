"""The backbone: megatron-core's TransformerBlock with our norm and our attention in its layer spec."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_bit.config import Config
from megatron_bit.model.attention import CoreAttention, RotaryEmbedding
from megatron_bit.model.flex import MaskedAttention
from megatron_bit.model.kernels import build_kernels
from megatron_bit.model.layers import QKNorm, RMSNorm, SwiGLU
from megatron_bit.parallel.groups import Groups
from megatron_bit.parallel.split import split_layers
from megatron_bit.precision.build import build_linears
from megatron_bit.precision.linears import Linears


def transformer_config(config: Config, groups: Groups) -> Any:
    """megatron-core's TransformerConfig for this run. Its fused kernels need apex or TE and stay off."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    m, dims = config.model, groups.dims
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    layout: list[list[str]] | None = None
    if dims.pp > 1:
        counts = split_layers(config, dims.num_chunks)
        layout = [["decoder"] * count for count in counts]
        layout[0].insert(0, "embedding")
        layout[-1].append("loss")
    recompute: dict[str, Any] = {}
    if config.parallel.recompute == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    mcore: Any = TransformerConfig(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        num_attention_heads=m.num_heads,
        num_query_groups=m.num_kv_heads,
        kv_channels=m.attention_head_dim,
        ffn_hidden_size=m.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=m.norm_eps,
        qk_layernorm=m.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # whose seam takes any module: ours (the "TE" in the name is history)
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=dims.tp,
        pipeline_model_parallel_size=dims.pp,
        virtual_pipeline_model_parallel_size=dims.vpp if dims.vpp > 1 else None,
        pipeline_model_parallel_layout=layout,
        sequence_parallel=dims.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.bf16,
        use_cpu_initialization=groups.device.type == "cpu",
        perform_initialization=False,  # weights are drawn by name (model/init.py)
        # Interleaved with batch_p2p_comm=True and no overlap runs and is wrong at PP=2 (loss off by 0.12).
        batch_p2p_comm=False,
        overlap_p2p_comm=dims.vpp > 1,
        # NCCL keeps a buffer alive until its send is done; gloo does not, and sends what was freed (h was wrong).
        deallocate_pipeline_outputs=groups.device.type == "cuda",
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        **recompute,
    )
    mcore.linears = build_linears(config, groups)  # what builds its linear layers, and ours
    mcore.kernels = build_kernels(config, groups)  # the forms of our other operations
    return mcore


def _attention(config: Config, device: torch.device) -> Any:
    """Builds every layer's attention of a chunk; they share the rotary table and the mask."""
    block_size = config.model.block_size if config.model.attention == "block_causal" else None
    masked = config.data.document_boundaries == "mask"
    rope, flex = RotaryEmbedding(config.model.rope_base), None
    if device.type == "cuda" and (masked or block_size is not None):
        flex = MaskedAttention(block_size, masked, device)
    return functools.partial(CoreAttention, block_size=block_size, rope=rope, masked=masked, flex=flex)


def _layer_spec(config: Config, linears: Linears, attention: Any) -> Any:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    qk_norm: Any = QKNorm if config.model.qk_norm else None
    add: Any = get_bias_dropout_add
    norm: Any = RMSNorm
    activation: Any = SwiGLU
    self_attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linears.column,
            core_attention=attention,
            linear_proj=linears.row,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=linears.column, activation_func=activation, linear_fc2=linears.row),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=self_attention,
            self_attn_bda=add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=add,
        ),
    )


class Backbone(nn.Module):
    """The layers of one pipeline chunk."""

    def __init__(
        self, config: Config, mcore: Any, groups: Groups, vp_stage: int | None, first: bool, last: bool
    ) -> None:
        super().__init__()
        from megatron.core.transformer.transformer_block import (
            TransformerBlock,
            TransformerBlockSubmodules,
            get_num_layers_to_build,
        )

        norm: Any = RMSNorm
        count = get_num_layers_to_build(mcore, vp_stage=vp_stage, pp_rank=groups.pp_rank)
        chunk = groups.pp_rank + groups.dims.pp * (vp_stage or 0)
        begin = sum(split_layers(config, groups.dims.num_chunks)[:chunk])
        attention = _attention(config, groups.device)
        specs = [_layer_spec(config, mcore.linears.of_layer(begin + i), attention) for i in range(count)]
        self.block = TransformerBlock(
            config=mcore,
            spec=TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm),
            pre_process=first,
            post_process=last,
            pg_collection=groups.collection,
            vp_stage=vp_stage,
        )

    def forward(self, hidden: Tensor | None, start: Tensor | None = None) -> Tensor:
        """hidden [s, b, D] (None: the tensor received from the previous chunk) to [s, b, D].

        start: int64 [b, S], where each position's document begins; None: there is one. It goes to the attention as an
        argument, under the name that megatron-core has for one, so that recomputation has the micro-batch's own.
        """
        return self.block(hidden_states=hidden, attention_mask=start)
