"""Numbers that were measured, which may be infinite or none: to say so instead of failing, in print and in JSON."""

from __future__ import annotations

import json
import math
from typing import Any


def exponential(x: float) -> float:
    """e to the x; infinite where a float has no room for it."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def quotient(a: float, b: float) -> float:
    """a / b; infinite (or no number, of 0 / 0) where b is 0."""
    return a / b if b else math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a)


def show(x: float, digits: int = 2) -> str:
    """So many digits behind the point, from 1e9 on as 1.234e+56; "inf" and "nan" as they are."""
    return f"{x:.{digits}f}" if abs(x) < 1e9 else f"{x:.4g}"


def finite(tree: Any) -> Any:
    """The same tree of JSON values, in which what is no finite number is None: NaN and Infinity are no JSON, and a
    strict reader would lose the whole file."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def json_of(tree: Any, **how: Any) -> str:
    """JSON of a `finite` tree. `how` is json.dumps'."""
    return json.dumps(finite(tree), allow_nan=False, **how)


def number(value: Any) -> float:
    """What `json_of` wrote; NaN for null."""
    return math.nan if value is None else float(value)
