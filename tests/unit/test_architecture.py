"""The floors of the house: a room imports from the floors below it alone, and no module comes back to itself."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "megatron_bit": ROOT / "megatron_bit",
    "mbit_data": ROOT / "data_prep" / "mbit_data",
    "mbit_launcher": ROOT / "launcher" / "mbit_launcher",
    "mbit_kernels": ROOT / "kernels" / "mbit_kernels",
}
FLOORS = [  # from the ground up; as the table in docs/architecture.md
    "errors", "io", "config", "mbit_kernels", "diffusion", "data", "run", "parallel", "planning", "precision", "model",
    "optim", "checkpoint", "mbit_data", "mbit_launcher", "training", "inference", "evaluation", "bench",
    "commands", "cli",
]  # fmt: skip
ALONE = {  # the one file that knows a package's engine
    "deepspeed": "megatron_bit.optim.zero",
    "transformer_engine": "megatron_bit.precision.te",
}


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


HANDED_OUT = "megatron_bit.inference.hf"  # runs where this project is not: its files import each other relatively


def _imports(module: str, path: Path) -> set[str]:
    """All that a file imports, inside functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if module.startswith(f"{HANDED_OUT}."):
                assert node.level == 1 or not source.startswith("megatron_bit"), f"{path}: an absolute import"
                source = f"{HANDED_OUT}.{source}" if node.level else source
            else:
                assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in MODULES else source)
    return found


IMPORTS = {module: _imports(module, path) for module, path in MODULES.items()}


def _room(module: str) -> str:
    package, *inside = module.split(".")
    return inside[0] if package == "megatron_bit" and inside else package


@pytest.mark.parametrize("floor", FLOORS)
def test_a_room_knows_the_floors_below_it_alone(floor: str) -> None:
    below = {*FLOORS[: FLOORS.index(floor) + 1], "megatron_bit"}  # the package itself has its version
    upwards = {
        f"{module} -> {other}"
        for module, others in IMPORTS.items()
        for other in others & MODULES.keys()
        if _room(module) == floor and _room(other) not in below
    }
    assert not upwards


def test_every_module_is_in_a_room() -> None:
    assert {_room(module) for module in MODULES} <= {*FLOORS, "megatron_bit", "__main__", "presets"}


def test_no_module_comes_back_to_itself() -> None:
    inside = {module: (others & MODULES.keys()) - {module} for module, others in IMPORTS.items()}
    try:
        TopologicalSorter(inside).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize(("package", "file"), ALONE.items())
def test_one_file_knows_an_engine(package: str, file: str) -> None:
    knows = {module for module, others in IMPORTS.items() if any(package in other.split(".") for other in others)}
    assert knows == {file}


def test_the_table_of_rooms_is_right() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## Rooms")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w/.]+)` \|", text, re.MULTILINE)
    names = [row.removesuffix("/").removesuffix(".py").rpartition("/")[2] for row in rows]
    assert names == FLOORS[::-1]  # what one looks for first stands on top


def _defined(path: Path) -> set[str]:
    """Names of a module, and of what its classes have: `f`, `C`, `C.f`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_what_the_page_names_is_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    ways = re.findall(r"^\| `([\w.]+)` \| `([\w/]+\.py)` \|", text, re.MULTILINE)
    answers = re.findall(r"`([\w.]+)` (?:in|of) `([\w/]+\.py)`", text)
    assert len(ways) > 25 and len(answers) > 10
    for name, file in (*ways, *answers):
        assert name in _defined(ROOT / "megatron_bit" / file), f"docs/architecture.md: {name} in {file}"
    batch = text.partition("**A batch")[2].partition("\n\nBack in")[0]
    assert len(re.findall(r"^\| `", batch, re.MULTILINE)) <= 8


def test_letters_of_shapes_are_in_the_legend() -> None:
    import megatron_bit.model

    legend = set(re.findall(r"(?:^|\s{2,})(\w)   \w", megatron_bit.model.__doc__ or "", re.MULTILINE))
    letters = {"s", "S", "b", "n", "Q", "q", "K", "V", "B", "G", "U", "P", "M", "R", "T", "D", "W", "d"}
    assert letters == legend
    for room in ("model", "diffusion"):
        for path in (ROOT / "megatron_bit" / room).glob("*.py"):
            docstrings = (
                ast.get_docstring(node) or ""
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.FunctionDef | ast.ClassDef)
            )
            for shape in re.findall(r"\[([\w, ]+)\](?!\()", " ".join(docstrings)):
                letters = {part for part in shape.split(", ") if len(part) == 1 and part.isalpha()}
                assert letters <= legend, f"{path.name}: [{shape}]"
