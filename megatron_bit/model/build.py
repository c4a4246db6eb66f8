"""This rank's chunks of the model: made, initialised by parameter name, and with complete gradients."""

from __future__ import annotations

from megatron_bit.config import Config
from megatron_bit.model.backbone import transformer_config
from megatron_bit.model.bitlm import BitLM
from megatron_bit.model.chunk import ModelChunk
from megatron_bit.model.codec import Codec
from megatron_bit.model.init import initialize
from megatron_bit.model.layers import sum_partial_grads
from megatron_bit.parallel.groups import Groups


def build_model(config: Config, vocab_size: int, groups: Groups) -> list[ModelChunk]:
    """This rank's chunks (more than one only with vpp > 1), initialised by parameter name, on the device.

    Raises:
        UserError: the vocabulary does not fit the bits.
    """
    from megatron.core.enums import ModelType

    dims = groups.dims
    codec = Codec(config.model.code, vocab_size, config.model.bits).to(groups.device)
    mcore = transformer_config(config, groups)
    chunks = []
    for vp in range(dims.vpp):
        first = groups.is_first_stage and vp == 0
        last = groups.is_last_stage and vp == dims.vpp - 1
        chunk = BitLM(config, mcore, codec, groups, vp if dims.vpp > 1 else None, first, last)
        chunk.model_type = ModelType.encoder_or_decoder  # type: ignore[assignment]  # asked for by the schedules
        initialize(chunk, config, groups)
        sum_partial_grads(chunk, groups.tp)
        chunks.append(chunk.to(groups.device))
    return chunks
