"""YAML files, read strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_bit.errors import UserError

MOST_YAML_BYTES = 2**20


class _UniqueKeys(yaml.constructor.BaseConstructor):
    """Refuses a key that is given twice; YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            try:
                hash(key)
            except TypeError:
                raise yaml.constructor.ConstructorError(None, None, "a key is no text", key_node.start_mark) from None
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class SafeYaml(_UniqueKeys, yaml.SafeLoader):
    """Numbers are numbers, true is true."""


class TextYaml(_UniqueKeys, yaml.BaseLoader):
    """Every value is the text that stands there."""


def read_yaml(
    path: Path, what: str, instead: str, loader: type[SafeYaml] | type[TextYaml] = SafeYaml
) -> dict[str, Any]:
    """The mapping in a YAML file; UserError, which calls it `what`, and says `instead` if it does not exist."""
    try:
        if path.stat().st_size > MOST_YAML_BYTES:
            raise UserError(f"{what} {path} has over {MOST_YAML_BYTES:,} bytes, which none has; {instead}")
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)  # both are safe
    except RecursionError:
        raise UserError(f"{what} {path} is not valid YAML: nested too deeply") from None
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist; {instead}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as error:  # 2001-99-99, !!int x
        raise UserError(f"{what} {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not tree:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{what} {path} has to be a mapping of keys, not {type(tree).__name__}")
    return tree
