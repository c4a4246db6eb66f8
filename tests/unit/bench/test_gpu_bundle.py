"""What a GPU machine without a network is brought, and how it is installed there."""

from __future__ import annotations

import importlib
import json
import platform
import re
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """scripts("fatbin"): a module of scripts/, which is no package."""
    monkeypatch.syspath_prepend(SCRIPTS)
    known = set(sys.modules)
    yield importlib.import_module
    for name in {path.stem for path in SCRIPTS.glob("*.py")} - known:
        sys.modules.pop(name, None)


def _entry(architecture: int, code: bytes) -> bytes:
    return (
        struct.pack("<HHIQ", 2, 0x101, 64, len(code)) + bytes(12) + struct.pack("<I", architecture) + bytes(32) + code
    )


def _container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    padded = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body
    return padded.ljust(-(-len(padded) // 8) * 8, b"\0")


def _library(section: bytes) -> bytes:
    """A 64-bit ELF file of three sections: none, .nv_fatbin, the names."""
    names = b"\0.nv_fatbin\0.shstrtab\0"
    header, table = 64, 64 + len(section) + 24
    rows = [(0, 0, 0, 0), (1, 1, header, len(section)), (12, 3, header + len(section), len(names))]
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    elf = ident + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    headers = b"".join(struct.pack("<IIQQQQIIQQ", n, kind, 0, 0, at, size, 0, 0, 1, 0) for n, kind, at, size in rows)
    return elf + section + names.ljust(24, b"\0") + headers


def test_one_architecture_is_kept(scripts: Any, tmp_path: Path) -> None:
    fatbin = scripts("fatbin")
    first = _container(_entry(80, b"a" * 24), _entry(90, b"b" * 40), _entry(120, b"c" * 8))
    second = _container(_entry(90, b"d" * 16), _entry(90, b"e" * 11))
    whole, small = tmp_path / "whole.so", tmp_path / "small.so"
    whole.write_bytes(_library(first + bytes(16) + second))
    assert fatbin.architectures(whole) == {80: 88, 90: 104 + 80 + 75, 120: 72}
    assert fatbin.keep(whole, small, 90) == (88 + 104 + 72 + 80 + 75, 104 + 80 + 75)
    assert fatbin.architectures(small) == {90: 104 + 80 + 75}
    made, given = small.read_bytes(), whole.read_bytes()
    assert len(made) == len(given)
    assert made[64 + 16 : 64 + 16 + 104] == _entry(90, b"b" * 40)  # at the front of its container
    assert made[64 + len(first) :] == given[64 + len(first) :]  # the other has nothing to lose, and nothing moved
    assert made[:64] == given[:64]
    with pytest.raises(ValueError, match=r"no code for sm_80 in a container that has \[90\]"):
        fatbin.keep(whole, small, 80)


def test_a_library_without_device_code(scripts: Any, tmp_path: Path) -> None:
    fatbin, file = scripts("fatbin"), tmp_path / "x.so"
    file.write_bytes(_library(b"").replace(b".nv_fatbin", b".no_fatbin"))
    with pytest.raises(ValueError, match=r"no section \.nv_fatbin"):
        fatbin.keep(file, tmp_path / "y.so", 90)
    file.write_bytes(b"#!/bin/sh".ljust(100))
    with pytest.raises(ValueError, match="ELF"):
        fatbin.architectures(file)


def test_what_a_machine_has_is_left_out(scripts: Any) -> None:
    bundle = scripts("gpu_bundle")
    have = bundle._names("# of that machine\nNumPy==2.5.2\ntyping_inspection @ file:///x\n\nrich\n")
    assert have == {"numpy", "typing-inspection", "rich"}
    lacking = {line.split("==")[0] for line in bundle._lacking(["pydantic>=2", "rich", "torch"], have)}
    assert lacking == {"pydantic", "pydantic-core", "annotated-types"}  # torch brings typing-extensions
    with pytest.raises(SystemExit, match="no-such-package is needed and not installed here"):
        bundle._lacking(["no-such-package"], set())


def _wheel(folder: Path, name: str, body: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.py", body)
        info = f"{name}-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return file.name


def _bundle(folder: Path, **manifest: Any) -> Path:
    from torch import __version__

    base = _wheel(folder / "base", "mbit_base_of_a_test", "here = True")
    engine = _wheel(folder / "engine", "mbit_engine_of_a_test", "")
    here = "{}.{}".format(*platform.python_version_tuple())
    own = {"python": here, "torch": __version__, "base": [base], "engine": [engine]}
    (folder / "bundle.json").write_text(json.dumps({**own, **manifest}))
    return folder


def test_what_is_no_bundle_is_not_replaced(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(sys, "argv", ["gpu_bundle.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        scripts("gpu_bundle").main()
    assert "holds other things than a bundle" in capsys.readouterr().err and (tmp_path / "thesis.tex").exists()


def test_an_engine_that_does_not_work_leaves_the_rest(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = scripts("install_bundle")
    monkeypatch.setattr(module, "_TRY", "import mbit_base_of_a_test, mbit_engine_of_a_test; raise OSError('no driver')")
    found = module.install(_bundle(tmp_path), tmp_path / "one")
    assert len(found.paths) == 1 and (Path(found.paths[0]) / "mbit_base_of_a_test.py").is_file()
    wanted = "does not work here: OSError: no driver; checking without Transformer Engine"
    assert found.steps[-1] == {"step": "engine", "result": wanted}
    monkeypatch.setattr(module, "_TRY", "import mbit_engine_of_a_test; print('works')")
    found = module.install(tmp_path, tmp_path / "two")
    assert len(found.paths) == 2 and found.steps[-1] == {"step": "engine", "result": "works"}
    monkeypatch.setattr(module, "_TRY", "import time; time.sleep(60)")
    monkeypatch.setattr(module, "LIMIT_S", 10)
    assert "took longer than 10 s" in module.install(tmp_path, tmp_path / "three").steps[-1]["result"]


def test_an_engine_for_another_torch_is_not_installed(scripts: Any, tmp_path: Path) -> None:
    found = scripts("install_bundle").install(_bundle(tmp_path, torch="1.0+cu0"), tmp_path / "site")
    assert len(found.paths) == 1 and found.steps[-1]["result"].startswith("is for torch 1.0+cu0, and this is ")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"python": "2.7"}, r"is for Python 2\.7, and this is 3"),
        ({"base": ["gone-1.0-py3-none-any.whl"]}, r"gone-1\.0-py3-none-any\.whl is not there: copy the bundle again"),
    ],
)
def test_a_bundle_that_cannot_be_used(
    manifest: dict[str, Any], message: str, scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        scripts("install_bundle").install(_bundle(tmp_path, **manifest), tmp_path / "site")
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_that_is_no_bundle(scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        scripts("install_bundle").install(tmp_path, tmp_path / "site")
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no readable bundle.json" in line and line.endswith("make it with scripts/gpu_bundle.py")
