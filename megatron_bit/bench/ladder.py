"""The rungs of `bench quality`: which settings are compared, and how their sizes are made equal."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_bit.config import Config
from megatron_bit.errors import UserError
from megatron_bit.planning.parameters import parameter_counts, table_parameters

PEER, PEER_WITH_MEMORY = "AR softmax", "AR softmax, memory"
# the rung whose parameters all others match
REFERENCE = ("model.head.kind=chain", "model.group_bits=8", "model.block_size=4")


@dataclass(frozen=True)
class Rung:
    """One configuration; `headline` rungs run with every seed, and of `text` ones a sample is shown."""

    name: str
    overrides: tuple[str, ...]
    headline: bool = False
    text: bool = False
    extra: bool = False  # run with --all-rungs alone

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def ladder(bits: int, peer_layers: int) -> list[Rung]:
    """All rungs, for tokens of so many bits; the peer has as many layers as the others' backbone and head together."""
    binary, semantic = ("model.code=binary",), ("model.code=semantic",)
    most = min(bits, 10)

    def joint(k: int, g: int, *more: str) -> tuple[str, ...]:
        return ("model.head.kind=diffusion", f"model.block_size={k}", f"model.group_bits={g}", *more)

    def chain(k: int, g: int, *more: str) -> tuple[str, ...]:
        return ("model.head.kind=chain", f"model.block_size={k}", f"model.group_bits={g}", *more)

    peer = ("model.head.kind=softmax", "model.block_size=1", "model.code=binary", f"model.num_layers={peer_layers}")
    four, eight = chain(4, 8, *semantic), joint(4, 8, *semantic)
    memory = "model.memory.rows=16384"
    rungs = [Rung(PEER, peer, headline=True), Rung(PEER_WITH_MEMORY, (*peer, memory), headline=True)]
    if math.ceil(bits / most) < math.ceil(bits / 8):  # else they are the groups of the rungs below
        rungs += [
            Rung(f"chain K=1 g={most} semantic", chain(1, most, *semantic), headline=True),
            Rung(f"chain K=4 g={most} semantic", chain(4, most, *semantic), headline=True, text=True),
            Rung(f"chain K=8 g={most} semantic", chain(8, most, *semantic), extra=True),
        ]
    rungs += [
        Rung(f"chain K={k} g=8 semantic", chain(k, 8, *semantic), headline=k == 4, text=k == 4) for k in (1, 2, 4, 8)
    ]
    names, tied = "model.names=pairs", "model.head.prior_rank=null"
    before, soft = "model.head.token_before=true", "model.head.soft_prior=true"
    if bits > 8:  # several groups
        deeper = (
            f"model.num_layers={peer_layers // 2 - 1}",
            f"model.head.num_layers={peer_layers - peer_layers // 2 + 1}",
        )
        rungs += [
            Rung("chain K=1 g=8 semantic, names", chain(1, 8, *semantic, names), extra=True),
            Rung("chain K=4 g=8 semantic, names", (*four, names)),
            Rung("chain K=4 g=8 semantic, tied prior", (*four, tied), extra=True),
            Rung("chain K=4 g=8 semantic, names, tied prior", (*four, names, tied), headline=True, text=True),
            Rung("chain K=4 g=8 semantic, names, tied prior, a layer moved to the head", (*four, names, tied, *deeper)),
            Rung("chain K=4 g=8 semantic, names, tied prior, memory", (*four, names, tied, memory)),
            Rung(
                "chain K=4 g=8 semantic, names, tied prior, a layer moved to the head, memory",
                (*four, names, tied, *deeper, memory),
                headline=True,
            ),
            Rung(
                "chain K=4 g=8 semantic, names, tied prior, a layer moved to the head, noisy blocks",
                (*four, names, tied, *deeper, "diffusion.noisy_every=8"),
                extra=True,
            ),
            Rung("chain K=8 g=8 semantic, names, tied prior", chain(8, 8, *semantic, names, tied), extra=True),
            Rung(
                "chain K=8 g=8 semantic, names, tied prior, memory",
                chain(8, 8, *semantic, names, tied, memory),
                extra=True,
            ),
        ]
    rungs += [
        Rung("chain K=4 g=8 binary", chain(4, 8, *binary)),
        Rung("chain K=4 g=8 random", chain(4, 8, "model.code=random"), extra=True),
        Rung("chain K=4 g=4 semantic", chain(4, 4, *semantic)),
        Rung("chain K=4 g=1 semantic", chain(4, 1, *semantic)),
        Rung("chain K=4 g=8 semantic, window 1", (*four, "model.head.window=1"), extra=True),
        Rung("chain K=4 g=8 semantic, window 4", (*four, "model.head.window=4"), extra=True),
        Rung("chain K=4 g=8 semantic, window 16", (*four, "model.head.window=16"), extra=True),
        Rung("chain K=4 g=8 semantic, no prior", (*four, "model.head.prior=false"), extra=True),
        Rung("chain K=4 g=8 semantic, block-causal", (*four, "model.attention=block_causal"), extra=True),
        Rung("chain K=4 g=8 semantic, head of 1 layer", (*four, "model.head.num_layers=1")),
        Rung("chain K=4 g=8 semantic, head of 2 layers", (*four, "model.head.num_layers=2")),
        Rung("chain K=4 g=8 semantic, head of 4 layers", (*four, "model.head.num_layers=4")),
        Rung("diffusion K=4 g=8 semantic", eight, text=True),
        Rung("diffusion K=4 g=8 semantic, token before", (*eight, before)),
        Rung("diffusion K=4 g=8 semantic, token before, soft prior", (*eight, before, soft)),
        Rung("diffusion K=4 g=8 semantic, token before, soft prior, names", (*eight, before, soft, names)),
        Rung(
            "diffusion K=4 g=8 semantic, token before, soft prior, names, levels apart",
            (*eight, before, soft, names, "diffusion.levels_apart=3"),
            text=True,
        ),
        Rung("diffusion K=4 g=8 semantic, no prior", (*eight, "model.head.prior=false")),
        Rung("diffusion K=4 g=8 semantic, 1 noise sample", (*eight, "diffusion.noise_samples=1")),
        Rung("diffusion K=4 g=8 semantic, mse", (*eight, "diffusion.loss=mse")),
        Rung("diffusion K=4 g=8 semantic, entropy rate", (*eight, "diffusion.noise=entropy_rate")),
        Rung("diffusion K=4 g=8 semantic, block-causal", (*eight, "model.attention=block_causal")),
        Rung("diffusion K=4 g=8 semantic, self-conditioning", (*eight, "diffusion.self_condition=0.5"), extra=True),
        Rung("diffusion K=1 g=8 semantic", joint(1, 8, *semantic), extra=True),
        Rung("diffusion K=4 g=4 semantic", joint(4, 4, *semantic), extra=True),
        Rung("diffusion K=4 g=1 semantic, bce", joint(4, 1, *semantic, "diffusion.loss=bce"), extra=True),
        Rung("diffusion K=4 g=1 semantic, direct", joint(4, 1, *semantic, "diffusion.parameterization=direct")),
    ]
    for k in (1, 2, 4, 8):
        rungs += [
            Rung(f"diffusion K={k} g=1 {code}", joint(k, 1, f"model.code={code}")) for code in ("binary", "semantic")
        ]
    return rungs


def peer_of(name: str) -> str:
    """The rung that one of this name is compared with: with a memory if it has one."""
    return PEER_WITH_MEMORY if name.endswith(", memory") else PEER


def select(rungs: Sequence[Rung], only: Sequence[str], all_rungs: bool) -> list[Rung]:
    """Those that `only` names, by their whole name or else by a part of it; without it all but the extra ones.
    UserError if one of `only` is none."""
    if not only:
        return [rung for rung in rungs if all_rungs or not rung.extra]
    names, wanted = {rung.name for rung in rungs}, set[str]()
    for part in only:
        found = {part} & names or {name for name in names if part in name}
        if not found:
            pairs = "; key=value pairs go before the options" * ("=" in part and "." in part)
            raise UserError(f"--only {part!r} is no rung of the ladder{pairs}: {'; '.join(r.name for r in rungs)}")
        wanted |= found
    return [rung for rung in rungs if rung.name in wanted]


def fit_width(config: Config, target: Config) -> Config:
    """The configuration with that width of the backbone's SwiGLU which comes closest to the target's parameters.

    Tables are left out on both sides: rows for tokens or values of groups, and the projections onto them. The width
    is a multiple of 8.

    Raises:
        UserError: no width comes within 2 %.
    """
    wanted, narrowest = other_parameters(target), _with_width(config, 8)
    eight_more = other_parameters(_with_width(config, 16)) - other_parameters(narrowest)  # parameters grow linearly
    steps = round((wanted - other_parameters(narrowest)) / eight_more)
    best = _with_width(config, 8 + 8 * min(max(0, steps), 8 * config.model.hidden_size - 2))  # below 64 times the width
    if abs(other_parameters(best) - wanted) > 0.02 * wanted:
        raise UserError(
            f"no width of the backbone gives {wanted:,} parameters outside of tables; nearest "
            f"{other_parameters(best):,}"
        )
    return best


def other_parameters(config: Config) -> int:
    """Parameters outside of tables."""
    return sum(parameter_counts(config).values()) - table_parameters(config)


def _with_width(config: Config, width: int) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"ffn_hidden_size": width})})
