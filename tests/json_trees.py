"""JSON that somebody has changed: one value in a tree, and what may stand there instead."""

from __future__ import annotations

import copy
from typing import Any


def changed(tree: dict[str, Any], where: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy of the tree with another value at `where`, keys and indices from the root on."""
    tree = copy.deepcopy(tree)
    node: Any = tree
    for part in where[:-1]:
        node = node[part]
    node[where[-1]] = value
    return tree
