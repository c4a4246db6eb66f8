"""The sizes of `bench quality`: the small model and the one for a GPU, and either at other widths by one rule.

At `--sizes` the width of backbone and head changes, with the number of layers and heads kept, and with it by a rule the
standard deviation of the initial weights (by the root of the width, as PyTorch's own) and the learning rate, by the
width: what Adam's has to do for hidden matrices (Yang et al., Tensor Programs V, arXiv 2203.03466), and what was found
for the peer and for a chain at three widths (docs/quality.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_bit.bench.curves import parse_count
from megatron_bit.bench.ladder import REFERENCE, other_parameters
from megatron_bit.config import Config, load_config
from megatron_bit.errors import UserError

LR_POWER = 1.0  # of the width, by which the learning rate falls: as in Tensor Programs V, and as measured
WIDTHS = 16  # a width is a multiple of these
# what a rung does not say it has not, whatever the preset has
PLAIN = (
    "model.names=sum", "model.head.prior_rank=0", "model.head.token_before=false", "model.head.soft_prior=false",
    "diffusion.noisy_every=0",
)  # fmt: skip
SIZES: dict[str, tuple[str, ...]] = {
    "small": (
        "model.hidden_size=96", "model.num_heads=4", "model.num_kv_heads=4", "model.num_layers=3",
        "model.ffn_hidden_size=256", "model.init_std=0.04", "model.head.num_layers=3", "model.head.hidden_size=96",
        "model.head.num_heads=4", "model.head.ffn_hidden_size=256", "data.seq_length=256",
        "train.global_batch_size=4", "train.micro_batch_size=4", "train.precision=fp32", "optim.lr=6.0e-3",
        "optim.warmup_steps=50", "evaluate.samples=128", "evaluate.noise_samples=16", *PLAIN,
    ),
    "gpu": (
        "model.hidden_size=512", "model.num_heads=8", "model.num_kv_heads=8", "model.num_layers=8",
        "model.ffn_hidden_size=1408", "model.init_std=0.02", "model.head.num_layers=3", "model.head.hidden_size=512",
        "model.head.num_heads=8", "model.head.ffn_hidden_size=1408", "data.seq_length=1024",
        "train.global_batch_size=64", "train.micro_batch_size=32", "train.precision=bf16", "optim.lr=6.0e-4",
        "optim.warmup_steps=200", "evaluate.samples=512", "evaluate.noise_samples=32", *PLAIN,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What all rungs of a size have in common."""

    settings: tuple[str, ...]
    target: Config  # whose parameters outside of tables all rungs have

    @property
    def parameters(self) -> int:
        """Outside of tables."""
        return other_parameters(self.target)


def of_width(budget: str, width: int) -> tuple[str, ...]:
    """The settings of SIZES[budget] that another width of backbone and head changes, in addition to them."""
    base = load_config(preset="laptop", overrides=SIZES[budget])
    ratio = width / base.model.hidden_size
    ffn, head_ffn = (8 * max(1, round(size * ratio / 8)) for size in _ffn_sizes(base))
    return (
        f"model.hidden_size={width}", f"model.head.hidden_size={width}", f"model.ffn_hidden_size={ffn}",
        f"model.head.ffn_hidden_size={head_ffn}", f"model.init_std={base.model.init_std / math.sqrt(ratio):.4g}",
        f"optim.lr={base.optim.lr / ratio**LR_POWER:.4g}",
    )  # fmt: skip


def sizes(budget: str, wanted: Sequence[str], common: Sequence[str], settings: Sequence[str], vocab: int) -> list[Size]:
    """The budget's own size, or those of the widths that come closest to `wanted` parameters outside of tables.

    Args:
        wanted: such as 0.3M, ascending or not.
        common: of all sizes; `settings` of the user come behind the rule and so replace what it says.
        vocab: size of the vocabulary.

    Raises:
        UserError: two of them are one, or one is too small.
    """

    def make(more: Sequence[str]) -> Size:
        all_of_it = (*SIZES[budget], *common, *more, *settings)
        target = load_config(preset="laptop", overrides=[*all_of_it, *REFERENCE]).with_vocab_size(vocab)
        return Size(all_of_it, target)

    if not wanted:
        return [make(())]
    made = {}
    for count, text in sorted((parse_count(text, "--sizes"), text) for text in wanted):
        size = make(of_width(budget, _width(budget, count)))
        if abs(size.parameters - count) > 0.2 * size.parameters or size.parameters in made:
            raise UserError(
                f"--sizes {text}: the nearest width gives {size.parameters:,} parameters outside of tables; widths are "
                f"multiples of {WIDTHS}, and every size has one of its own"
            )
        made[size.parameters] = size
    return [*made.values()]


def _width(budget: str, parameters: int) -> int:
    """The multiple of WIDTHS at which the layers have about so many parameters: they grow with its square."""
    base = load_config(preset="laptop", overrides=[*SIZES[budget], *REFERENCE]).with_vocab_size(256)
    at_base = other_parameters(base) / base.model.hidden_size**2
    return WIDTHS * max(1, round(math.sqrt(parameters / at_base) / WIDTHS))


def _ffn_sizes(config: Config) -> tuple[int, int]:
    backbone, head = config.model.ffn_hidden_size, config.model.head.ffn_hidden_size
    assert backbone is not None and head is not None  # SIZES has them
    return backbone, head
