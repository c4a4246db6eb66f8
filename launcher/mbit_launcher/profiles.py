"""`megatron-bit cluster profiles`: the files of slurm/, to copy and change; in a wheel they are in `slurm_files`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_bit.errors import UserError
from megatron_bit.io.files import write_atomic

_CHECKOUT = Path(__file__).parents[2] / "slurm"


def main(out: Path | None) -> int:
    """List the files, or copy them to a folder. UserError: one of them is there and is another one."""
    files = list(_files())
    if out is None:
        for path in files:
            print(f"{path.name:20}{_about(path)}")
        print("\nmegatron-bit cluster profiles --out DIR copies them; then --cluster DIR/cpu.yaml")
        return 0
    changed = [out / path.name for path in files if _differs(path, out / path.name)]
    if changed:
        raise UserError(f"{changed[0]} is there, and is not the shipped one; give another --out, or move it away")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in files:
            write_atomic(out / path.name, path.read_bytes())
            print(out / path.name)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror} ({error.filename})") from None
    return 0


def _files() -> Iterator[Path]:
    """Profiles first."""
    packaged = Path(__file__).parent / "slurm_files"  # scripts/hatch_build.py
    root = packaged if packaged.is_dir() else _CHECKOUT
    yield from sorted((root / "clusters").glob("*.yaml"))
    yield from sorted(root.glob("*.sbatch"))


def _about(path: Path) -> str:
    """The first line of its comment."""
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#!"))
    return next(lines).removeprefix("# ")


def _differs(path: Path, there: Path) -> bool:
    try:
        return there.read_bytes() != path.read_bytes()
    except FileNotFoundError:
        return False
    except OSError:
        return True
