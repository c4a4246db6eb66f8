"""Which form of an operation runs on a device: what was measured there decides. Imports no torch.

plain: eager torch, as everywhere. compiled: torch.compile of the plain form. triton: our kernel.

measured.json holds what `scripts/gpu_check.py --only kernels` measured: device name -> operation -> {"winner": form,
"sizes": {size: {form: milliseconds forward and backward}}}, and "versions" of torch and triton. A device or an
operation that is not in it runs plain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Literal, cast, get_args

Form = Literal["plain", "compiled", "triton"]
FORMS: tuple[Form, ...] = get_args(Form)
MARGIN = 1.1  # times as fast as torch.compile a kernel of ours has to be; below that it is not worth its upkeep


def winner(times: Sequence[Mapping[str, float]]) -> Form:
    """The form to use, from times of every size: Triton only where it is faster by MARGIN at each of them.

    A form without a time at some size did not run there, or was wrong, and cannot win.
    """
    complete = [form for form in FORMS if times and all(form in row for row in times)]
    others = [form for form in complete if form != "triton"]
    if "triton" in complete and "compiled" in complete:
        ahead = all(MARGIN * row["triton"] <= row["compiled"] for row in times)
        if ahead and all(row["triton"] <= row[form] for row in times for form in others):
            return "triton"
    total = {form: sum(row[form] for row in times) for form in others}
    return "compiled" if "compiled" in total and total["compiled"] < total.get("plain", float("inf")) else "plain"


def measurements() -> dict[str, Any]:
    """The table that came with the package."""
    return json.loads(resources.files("mbit_kernels").joinpath("measured.json").read_text())


def chosen(operations: Sequence[str], device: str, asked: str, table: Mapping[str, Any]) -> dict[str, Form]:
    """The form of every operation on a device of this name; `asked` is `auto`, or a form for all of them."""
    if asked != "auto":
        return {name: cast(Form, asked) for name in operations}
    rows = table.get(device, {})
    return {name: rows[name]["winner"] if name in rows else "plain" for name in operations}


def as_table(device: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What measured.json has of a device, from rows of {"operation", "size", "times": {form: milliseconds}}."""
    operations: dict[str, Any] = {}
    for row in rows:
        operations.setdefault(row["operation"], {})[row["size"]] = dict(row["times"])
    return {device: {name: {"winner": winner(list(s.values())), "sizes": s} for name, s in operations.items()}}
