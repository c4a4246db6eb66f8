"""What the documents say is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_bit.cli import COMMANDS, GROUPS
from megatron_bit.commands.reference import markdown
from megatron_bit.config import load_config, preset_names
from megatron_bit.parallel.dims import ParallelDims

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_configuration_reference_is_current() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_links_exist(page: Path) -> None:
    text = page.read_text()
    for match in re.finditer(r"megatron-bit ([a-z]+)(?: ([a-z]+))?", text):
        command, second = match.groups()
        assert command in COMMANDS, match.group(0)
        if command in GROUPS and second is not None:
            assert second in GROUPS[command], match.group(0)
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "extending.md"], ids=lambda p: p.name)
def test_keys_exist(page: Path) -> None:
    from megatron_bit.config import leaves

    names = {name for name, _ in leaves()}
    sections = {name.partition(".")[0] for name in names if "." in name}
    for section, key in re.findall(r"\b([a-z]+)\.([a-z_.]+[a-z])=", page.read_text()):
        if section in sections:
            assert f"{section}.{key}" in names, f"{page.name} names {section}.{key}"


@pytest.mark.parametrize("name", preset_names())
def test_presets_fit_a_machine(name: str) -> None:
    config = load_config(preset=name)
    ParallelDims.build(config, max(8, config.parallel.tp * config.parallel.pp) if name != "laptop" else 4)


def test_tests_that_are_named_are_there() -> None:
    """In pages and in docstrings: files move."""
    root = Path(__file__).parents[2]
    pages = [*root.glob("*.md"), *(root / "docs").glob("*.md"), *(root / "megatron_bit").rglob("*.py")]
    named = {name for page in pages for name in re.findall(r"tests/[a-z_]+/[a-z_/]*test_[a-z_]+\.py", page.read_text())}
    assert len(named) > 20 and not [name for name in named if not (root / name).exists()]
