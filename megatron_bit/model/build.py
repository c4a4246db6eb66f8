"""This rank's chunks of the model: made, initialised by parameter name, and with complete gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from megatron_bit.config import Config
from megatron_bit.model.backbone import transformer_config
from megatron_bit.model.bitlm import BitLM
from megatron_bit.model.chain import ChainLM
from megatron_bit.model.chunk import ModelChunk, Place
from megatron_bit.model.codec import build_codec
from megatron_bit.model.init import initialize
from megatron_bit.model.layers import sum_partial_grads
from megatron_bit.model.softmax import SoftmaxLM
from megatron_bit.parallel.dims import check_vocabulary
from megatron_bit.parallel.groups import Groups


def build_model(
    config: Config, vocab_size: int, groups: Groups, eos_id: int | None = None, learned: Tensor | None = None
) -> list[ModelChunk]:
    """This rank's chunks (more than one only with vpp > 1), initialised by parameter name, on the device.

    Args:
        eos_id: the end-of-document token, for a softmax head.
        vocab_size: of the data; 0 for raw records.
        learned: int8 [V, B], the table of a learned code (`model.code=semantic`).

    Raises:
        UserError: the vocabulary does not fit the bits, or cannot be split over TP; the same on every rank.
    """
    from megatron.core.enums import ModelType

    dims, config = groups.dims, config.with_vocab_size(vocab_size)
    make: Callable[[Config, Place], ModelChunk]
    if config.model.head.kind == "softmax":
        assert eos_id is not None
        check_vocabulary(config)
        make = functools.partial(SoftmaxLM, eos_id=eos_id)
    else:
        codec = build_codec(config.model, vocab_size, learned).to(groups.device)
        make = functools.partial(ChainLM if config.model.head.kind == "chain" else BitLM, codec=codec)
    mcore = transformer_config(config, groups)
    chunks = []
    for vp in range(dims.vpp):
        first = groups.is_first_stage and vp == 0
        last = groups.is_last_stage and vp == dims.vpp - 1
        chunk = make(config, Place(mcore, groups, vp if dims.vpp > 1 else None, first, last))
        chunk.model_type = ModelType.encoder_or_decoder  # type: ignore[assignment]  # asked for by the schedules
        initialize(chunk, config, groups)
        sum_partial_grads(chunk, groups.tp)
        chunks.append(chunk.to(groups.device))
    return chunks
