"""What commands share: positional arguments, and how a configuration is told from key=value pairs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from megatron_bit.config import leaves
from megatron_bit.errors import UserError
from megatron_bit.io.paths import user_location, user_path

if TYPE_CHECKING:
    from megatron_bit.config import Config

Args = Annotated[tuple[str, ...], tyro.conf.Positional]
PATHS = tyro.constructors.ConstructorRegistry()  # in force for all commands: every Path is as users write it


@PATHS.primitive_rule
def _path(type_info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
    if type_info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: user_path(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


Location = Annotated[  # a folder, a URL or a command, as users write it
    str,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="DIR",
        instance_from_str=lambda words: user_location(words[0]),
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
]


def split(args: tuple[str, ...], preset: str | None = None) -> tuple[str | None, tuple[str, ...]]:
    """(file or folder, overrides) of the positional arguments.

    A word with a `=` in it is a setting, unless there is a file or folder of this name: a run may be called
    `sweep/optim.lr=1e-3`. A run that is called like a key, `optim.lr=1e-3`, is meant where nothing else says what to
    configure; elsewhere it is `./optim.lr=1e-3`.
    """
    keys = {name for name, _ in leaves()}
    alone = preset is None and all("=" in word for word in args)

    def is_target(word: str) -> bool:
        key, equals, _ = word.partition("=")
        if not equals:
            return True
        path = Path(word)
        return os.path.exists(path) and (
            key not in keys or (alone and (path.is_file() or (path / "config.yaml").exists()))
        )

    targets = [word for word in args if is_target(word)]
    if len(targets) > 1:
        raise UserError(f"{targets[1]!r} is neither key=value nor the one configuration, which is {targets[0]!r}")
    target = str(user_path(targets[0])) if targets else None
    return target, tuple(word for word in args if word not in targets)


def configuration(args: tuple[str, ...], preset: str) -> Config:
    """The given YAML file or run, or the preset if there is none, with the key=value pairs."""
    from megatron_bit.run.folder import resolve

    target, overrides = split(args)
    return resolve(target, overrides, None if target else preset)


def bitlm_configuration(args: tuple[str, ...], preset: str) -> Config:
    """The same for a command that measures BitLMs alone; UserError if it asks for a softmax head."""
    config = configuration(args, preset)
    if config.model.head.kind == "softmax":
        raise UserError("model.head.kind softmax cannot be measured here, only BitLMs; leave it at diffusion")
    return config
