"""What commands share: positional arguments, and how a configuration is told from key=value pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import tyro

from megatron_bit.errors import UserError

if TYPE_CHECKING:
    from megatron_bit.config import Config

Args = Annotated[tuple[str, ...], tyro.conf.Positional]


def split(args: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """(file or folder, overrides) of the positional arguments."""
    targets = [a for a in args if "=" not in a]
    if len(targets) > 1:
        raise UserError(f"{targets[1]!r} is neither key=value nor the one configuration, which is {targets[0]!r}")
    return next(iter(targets), None), tuple(a for a in args if "=" in a)


def configuration(args: tuple[str, ...], preset: str) -> Config:
    """The given YAML file, or the preset if there is none, with the key=value pairs."""
    from megatron_bit.config import load_config

    target, overrides = split(args)
    return load_config(target, overrides, None if target else preset)


def bitlm_configuration(args: tuple[str, ...], preset: str) -> Config:
    """The same for a command that measures BitLMs alone; UserError if it asks for a softmax head."""
    config = configuration(args, preset)
    if config.model.head.kind == "softmax":
        raise UserError("model.head.kind softmax cannot be measured here, only BitLMs; leave it at diffusion")
    return config
