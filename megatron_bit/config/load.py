"""From presets, YAML files and `key=value` to a validated configuration, and back to YAML."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from megatron_bit.config.model import ModelConfig
from megatron_bit.config.section import Section
from megatron_bit.config.tree import Config
from megatron_bit.config.yaml_file import read_yaml
from megatron_bit.errors import UserError
from megatron_bit.io.paths import user_location

_AUTO = re.compile(r"auto(?: (\d{1,3}))?")  # of model.bits


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(
        p.name[: -len(".yaml")] for p in resources.files("megatron_bit.presets").iterdir() if p.name.endswith(".yaml")
    )


def leaves(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the tree as (dotted name, pydantic field)."""
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from leaves(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a plain tree as (dotted name, value)."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    preset: str | None = None,
    given: tuple[str, dict[str, Any]] | None = None,
    fewest_bits: Callable[[str], int] | None = None,
) -> Config:
    """Merge the layers and validate.

    A YAML file may itself name a `preset`. `given` is one more layer, above the preset: what it is, and its tree.
    Paths are taken as users write them (paths.py) in the file and in overrides, and as they stand in `given`.
    `fewest_bits` says for `model.bits: auto` how many a token of a data folder needs; without it no data is looked at.
    Raises UserError with one line: key, value, where it was set, what to do.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    if path is not None:
        instead = f"give a YAML file, or --preset {'|'.join(preset_names())}"
        tree = read_yaml(Path(path), "configuration", instead)
        named = tree.pop("preset", None)
        preset = preset or named
        layers.append((str(path), _expanded(tree, str(path))))
    if preset is not None:
        if preset not in preset_names():
            raise UserError(f"preset {preset!r} does not exist; choose one of {', '.join(preset_names())}")
        text = resources.files("megatron_bit.presets").joinpath(f"{preset}.yaml").read_text()
        layers.insert(0, (f"preset {preset}", yaml.safe_load(text)))
    if given is not None:
        layers.insert(preset is not None, given)
    layers.extend(("command line", _expanded(_parse_override(item), "command line")) for item in overrides)
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, tree in layers:
        _merge(merged, _renewed(tree), source, origin)
    _settle_bits(merged, fewest_bits)
    return config_from_dict(merged, origin)


def _settle_bits(tree: dict[str, Any], fewest_bits: Callable[[str], int] | None) -> None:
    """`model.bits: auto` becomes a number, so that nothing behind here meets the word."""
    said = _AUTO.fullmatch(str(tree.get("model", {}).get("bits")))
    if said is None:
        return
    data = tree.get("data", {})
    sources = data.get("sources")
    first = sources[0] if isinstance(sources, list) and sources and isinstance(sources[0], Mapping) else {}
    folder = data.get("path") or first.get("path")
    if isinstance(folder, str) and folder and fewest_bits is not None:
        tree["model"]["bits"] = fewest_bits(folder)
    else:
        tree["model"]["bits"] = int(said[1] or ModelConfig.model_fields["bits"].default)


def config_from_dict(tree: Mapping[str, Any], origin: Mapping[str, str] | None = None) -> Config:
    """Validate a plain tree; UserError with one line on the first thing that is wrong."""
    return validated(Config, _renewed(tree), origin or {})


def _renewed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with the keys of today: configurations of before are read as they were meant."""
    log = tree.get("log")
    if not isinstance(log, Mapping) or not isinstance(log.get("tensorboard"), bool):
        return dict(tree)
    rest = {key: value for key, value in log.items() if key != "tensorboard"}
    return {**tree, "log": {"to": ["tensorboard"] if log["tensorboard"] else [], **rest}}


S = TypeVar("S", bound=Section)


def validated(section: type[S], tree: Mapping[str, Any], origin: Mapping[str, str], prefix: str = "") -> S:
    """`tree` as a `section`, whose keys a message shows behind `prefix`; UserError on the first thing that is wrong.

    Args:
        origin: where the dotted keys were set.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        problems = error.errors()
        first = problems[0]
        key = ".".join(str(part) for part in first["loc"])
        source = _origin(key, origin)
        message = first["msg"].removeprefix("Value error, ")
        value = first.get("input")
        if first["type"] == "value_error":  # a check between keys: the message names them
            where = f"{prefix}{key}: " if key else ""
            text = f"{where}{message}"
        elif first["type"] == "extra_forbidden":
            names = [name for name, _ in leaves(section)]
            close = difflib.get_close_matches(key, names, n=1) or names
            where = f" ({source})" if source else ""
            text = f"{prefix}{key}{where} is no key here; did you mean {' or '.join(prefix + name for name in close)}?"
        else:
            where = f" ({source})" if source else ""
            # the value may be of any size: YAML can name a part of itself again and again
            shown = repr(value) if isinstance(value, str | int | float | None) else reprlib.repr(value)
            text = f"{prefix}{key} = {shown[:200]}{where}: {message[:1].lower()}{message[1:]}"
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(text + more) from None


def to_yaml(config: Config) -> str:
    """The resolved tree as YAML; `load_config` reads it back to the same tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


# keys that are a path, or a URL
PATHS = ("run", "data.path", "data.sources", "data.remote.cache", "train.init_from", "checkpoint.mirror")


def _expanded(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """The tree with its paths as the user means them. What is not text is left to the validation."""

    def place(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [{**one, "path": place(key, one.get("path"))} if isinstance(one, dict) else one for one in value]
        if not isinstance(value, str):
            return value
        try:
            value.encode()
            return user_location(value)
        except UnicodeEncodeError:  # safetensors opens no file below it: a run there could not be continued
            raise UserError(f"{key} = {value} ({source}): the name is no UTF-8; rename the folder") from None
        except UserError as error:
            raise UserError(f"{key} = {value} ({source}): {error}") from None

    def walk(node: dict[str, Any], prefix: str) -> dict[str, Any]:
        out = {}
        for name, value in node.items():
            key = f"{prefix}{name}"
            out[name] = walk(value, f"{key}.") if isinstance(value, dict) else value
            if key in PATHS:
                out[name] = place(key, value)
        return out

    return walk(tree, "")


def _parse_override(item: str) -> dict[str, Any]:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise UserError(f"{item!r} is not key=value; write for example train.steps=2000")
    field = dict(leaves()).get(key)
    try:
        value = text if field is not None and field.annotation is str else yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, AttributeError, OverflowError):
        value = text
    first, *rest = key.split(".")
    for part in reversed(rest):
        value = {part: value}
    return {first: value}


def _origin(key: str, origin: Mapping[str, str]) -> str:
    """Where a key was set; an element of a list was set where the list was."""
    while key:
        if key in origin:
            return origin[key]
        key = key.rpartition(".")[0]
    return ""


def _merge(into: dict[str, Any], tree: Mapping[str, Any], source: str, origin: dict[str, str]) -> None:
    def walk(target: dict[str, Any], node: Mapping[Any, Any], section: type[Section], prefix: str) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            field = section.model_fields.get(str(name))
            if field is None:
                while isinstance(value, Mapping) and len(value) == 1:  # the whole dotted key, as it was written
                    inner, value = next(iter(value.items()))
                    key = f"{key}.{inner}"
                raise UserError(f"{key} ({source}) is not a configuration key; {_suggest(key)}")
            origin[key] = source
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                if not isinstance(value, Mapping):
                    raise UserError(
                        f"{key} = {value!r} ({source}) is a section; set its keys, such as "
                        f"{key}.{next(iter(field.annotation.model_fields))}=..."
                    )
                walk(target.setdefault(name, {}), value, field.annotation, f"{key}.")
            else:
                target[name] = value

    walk(into, tree, Config, "")


def _suggest(key: str) -> str:
    names = [name for name, _ in leaves()]
    suffix = f".{key}"
    close = [name for name in names if name.endswith(suffix)]  # the right key without its section
    close = close or difflib.get_close_matches(key, names, n=1, cutoff=0.8)
    tail = key.rpartition(".")[2]
    close = close or [name for name in names if name.rpartition(".")[2] == tail]  # in the wrong section
    close = close or difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if not close:
        by_leaf = {name.rpartition(".")[2]: name for name in names}
        close = [by_leaf[m] for m in difflib.get_close_matches(tail, list(by_leaf), n=1, cutoff=0.6)]
    return f"did you mean {' or '.join(close[:4])}?" if close else "`megatron-bit config` lists them all"
