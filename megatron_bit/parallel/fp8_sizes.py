"""Sizes that FP8 matrix products accept (Transformer Engine 2.11), as configuration keys. Imports no torch."""

from __future__ import annotations

from megatron_bit.config import Config
from megatron_bit.errors import UserError
from megatron_bit.parallel.split import noisy_blocks

BLOCKS = {"block": 128, "mxfp8": 32, "nvfp4": 16}  # values that share a scale; the other recipes scale whole tensors
_ROWS, _CHANNELS = 8, 16  # what cuBLAS asks of a matrix in FP8


def check_fp8_sizes(config: Config, tp: int, sequence_parallel: bool) -> None:
    """UserError if a matrix product of this layout is not possible in FP8; nothing under another precision."""
    if not config.fp8_products:
        return
    m, h, block = config.model, config.model.head, BLOCKS.get(config.fp8.recipe, 1)
    channels = {
        "model.hidden_size": m.hidden_size,
        "model.num_heads x the width of a head": m.query_width,
        "(model.num_heads + 2 x model.num_kv_heads) x the width of a head": m.query_width + 2 * m.kv_width,
        "model.ffn_hidden_size": m.ffn_hidden_size,
    }
    if h.kind != "softmax":
        channels |= {"model.head.hidden_size": h.hidden_size, "model.head.ffn_hidden_size": h.ffn_hidden_size}
    unit = max(_CHANNELS, block)
    for key, value in channels.items():
        if value % (tp * unit):
            raise UserError(
                f"{key} {value} has to be a multiple of {unit} x parallel.tp {tp} = {tp * unit} for train.precision "
                f"{config.train.precision} with fp8.recipe {config.fp8.recipe}; change it, or parallel.tp"
            )
    rows, unit = config.train.micro_batch_size * config.data.seq_length, max(_ROWS, block)
    split = tp if sequence_parallel else 1
    if rows % (split * unit):
        raise UserError(
            f"train.micro_batch_size {config.train.micro_batch_size} x data.seq_length {config.data.seq_length} = "
            f"{rows} has to be a multiple of {split * unit}{' under sequence parallelism' if split > 1 else ''} for "
            f"train.precision {config.train.precision} with fp8.recipe {config.fp8.recipe}; change one of the two"
        )
    if every := config.noisy_every:
        count = noisy_blocks(every, config.data.seq_length // m.block_size, split)
        noisy = config.train.micro_batch_size * count * m.block_size
        if noisy % unit:
            raise UserError(
                f"diffusion.noisy_every {every} has {noisy} tokens of a micro-batch seen through noise on a rank, and "
                f"for train.precision {config.train.precision} with fp8.recipe {config.fp8.recipe} that has to be a "
                f"multiple of {unit}; change it, or train.micro_batch_size"
            )
