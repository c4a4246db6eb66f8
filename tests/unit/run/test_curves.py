"""Learning curves out of the logs, and the picture of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_bit.commands.plot import plot
from megatron_bit.errors import UserError
from megatron_bit.run.curves import POINTS, read_curves


def _run(folder: Path, steps: int, nats: float = 5.0) -> Path:
    folder.mkdir(parents=True)
    (folder / "identity.json").write_text("{}")
    lines = [
        json.dumps({"step": i, "tokens": 10 * i, "nats_per_token_bound": nats - i / steps}) for i in range(1, steps + 1)
    ]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    record = {"step": steps, "tokens": 10 * steps, "nats_per_token_bound": nats - 1, "standard_error": 0.1}
    (folder / "validation.jsonl").write_text(json.dumps(record) + "\n")
    return folder


LENGTHS = [(1, 1), (7, 7), (POINTS, POINTS), (POINTS + 1, 251), (3 * POINTS, POINTS)]


@pytest.mark.parametrize(("steps", "points"), LENGTHS)
def test_a_long_run_has_a_point_for_many_steps(steps: int, points: int, tmp_path: Path) -> None:
    found = read_curves(_run(tmp_path / "run", steps))
    assert len(found.train) == points
    width = -(-steps // POINTS)
    assert found.train[0] == pytest.approx((10 * (width + 1) / 2, (width + 1) / 2, 5 - (width + 1) / 2 / steps))
    weight = [width] * (points - 1) + [steps - width * (points - 1)]
    mean = sum(w * p[2] for w, p in zip(weight, found.train, strict=True)) / steps
    assert mean == pytest.approx(sum(5 - i / steps for i in range(1, steps + 1)) / steps)  # nothing is left out
    assert found.validation == [(10.0 * steps, float(steps), 4.0, 0.1)]


def test_what_is_cut_or_no_number_is_left_out(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 4)
    bad = [
        '{"step": 5, "tokens": 50, "nats_per_token_bound": NaN}',
        "[]",
        '{"step": 6}',
        "[" * 9999,
        '{"step": 7, "tok',
    ]
    with open(run / "log.jsonl", "a") as file:
        file.write("\n".join(bad))
    assert [point[1] for point in read_curves(run).train] == [1, 2, 3, 4]
    assert read_curves(tmp_path / "none").train == []


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_picture_of_a_sweep(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, nats in (("optim.lr=1e-3", 5.0), ("optim.lr=3e-4", 6.0)):
        _run(tmp_path / "sweep" / name, 20, nats)
    out = tmp_path / f"curves.{ending}"
    assert plot((tmp_path / "sweep",), out) == 0
    assert capsys.readouterr().out == f"{out}: 2 runs\n"
    begin = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert out.read_bytes().startswith(begin) and out.stat().st_size > 5000
    assert plot((tmp_path / "sweep" / "optim.lr=1e-3",), out, x="steps", nats=(3.0, 6.0)) == 0


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 3)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "identity.json").write_text("{}")
    for runs, how, said in (
        ((run,), {"out": tmp_path / "notes.txt"}, "notes.txt has to end in .png, .svg, .pdf"),
        ((run,), {"out": tmp_path / "none" / "x.png"}, "x.png cannot be written"),
        ((run,), {"nats": (5.0, 3.0)}, "give the lower one first"),
        ((tmp_path / "new",), {}, "no run has done a step yet"),
        ((tmp_path / "none",), {}, "is not a folder"),
    ):
        with pytest.raises(UserError, match=said):
            plot(runs, **{"out": tmp_path / "x.png", **how})  # pyright: ignore
    assert not (tmp_path / "x.png").exists()
