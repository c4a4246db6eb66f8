"""Which form of an operation runs: the rule, the table, what a run is told, and that all ranks do the same."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_checks
from gloo_ranks import run_ranks
from mbit_kernels import choice, matched_filter

from megatron_bit.bench import kernels as bench
from megatron_bit.config import load_config
from megatron_bit.errors import UserError
from megatron_bit.model import kernels

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        ([], "plain"),
        ([{"plain": 3.0}], "plain"),
        ([{"plain": 3.0, "compiled": 2.0}], "compiled"),
        ([{"plain": 2.0, "compiled": 2.0}], "plain"),
        ([{"plain": 3.0, "compiled": 1.1, "triton": 1.0}], "triton"),
        ([{"plain": 3.0, "compiled": 1.09, "triton": 1.0}], "compiled"),  # not 1.1 times as fast
        ([{"plain": 3.0, "compiled": 2.0, "triton": 1.0}, {"plain": 3.0, "compiled": 1.0, "triton": 1.0}], "compiled"),
        ([{"plain": 0.9, "compiled": 2.0, "triton": 1.0}], "plain"),
        ([{"plain": 3.0, "triton": 1.0}], "plain"),  # nothing says what torch.compile does
        ([{"plain": 3.0, "compiled": 2.0, "triton": 1.0}, {"plain": 3.0, "compiled": 2.0}], "compiled"),  # was wrong
    ],
)
def test_winner(times: list[dict[str, float]], wanted: str) -> None:
    assert choice.winner(times) == wanted


def test_chosen_by_the_device() -> None:
    table = {"GPU A": {"bit_loss": {"winner": "triton", "sizes": {}}, "versions": {}}}
    names = ("bit_loss", "nearest_token")
    assert choice.chosen(names, "GPU A", "auto", table) == {"bit_loss": "triton", "nearest_token": "plain"}
    assert set(choice.chosen(names, "GPU B", "auto", table).values()) == {"plain"}
    assert set(choice.chosen(names, "GPU A", "plain", table).values()) == {"plain"}
    assert set(choice.chosen(names, "GPU B", "triton", table).values()) == {"triton"}


def test_the_table_that_ships_follows_the_rule() -> None:
    for device, operations in choice.measurements().items():
        for name, row in operations.items():
            if name != "versions":
                assert name in kernels.OPERATIONS, (device, name)
                assert row["winner"] == choice.winner(list(row["sizes"].values())), (device, name)


def test_a_measurement_becomes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What gpu_check writes is what the choice reads; a wrong form has no time."""
    monkeypatch.setattr(choice, "measurements", lambda: {"GPU A": {}})
    monkeypatch.setattr(bench, "device_name", lambda device: "GPU B")
    row = {"operation": "bit_loss", "size": "8", "plain, ms": 3.0, "compiled, ms": 2.0, "triton, ms": 1.0}
    bench.write([row, {**row, "operation": "nearest_token", "triton, ms": "wrong"}], CPU, tmp_path / "measured.json")
    monkeypatch.undo()
    table = json.loads((tmp_path / "measured.json").read_text())
    assert list(table) == ["GPU A", "GPU B"] and table["GPU B"]["versions"]["torch"] == torch.__version__
    forms = choice.chosen(("bit_loss", "nearest_token"), "GPU B", "auto", table)
    assert forms == {"bit_loss": "triton", "nearest_token": "compiled"}


def test_measured_forms_are_compared_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A form with a wrong gradient is not timed."""

    def wrong(residual: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
        loss, error = matched_filter.bit_loss(residual, *rest)  # type: ignore[arg-type]
        return loss + 1e-3 * (residual - residual.detach()).sum(-1), error

    case = next(case for case in bench.cases(CPU) if case.operation == "bit_loss")
    monkeypatch.setattr(choice, "FORMS", ("plain",))
    row = bench._measured(case, CPU)
    assert row["right"] and isinstance(row["plain, ms"], float)
    monkeypatch.setattr(bench, "function", lambda operation, form: wrong)
    row = bench._measured(case, CPU)
    assert not row["right"] and row["plain, ms"] == "wrong"


def test_bound_functions_are_the_forms_themselves() -> None:
    """Nothing stands between a call and its form."""
    bound = kernels.bind(dict.fromkeys(kernels.OPERATIONS, "plain"), CPU)
    assert bound == kernels.PLAIN and bound.bit_loss is matched_filter.bit_loss
    assert {f.name for f in dataclasses.fields(bound)} == set(kernels.OPERATIONS)


def test_forced_forms_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"train.kernels triton is not possible here: it needs an NVIDIA GPU, and"):
        kernels.bind({"bit_loss": "triton"}, CPU)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    for form in ("triton", "compiled"):
        with pytest.raises(
            UserError, match=rf"train.kernels {form} .* triton is not installed; use train.kernels=plain"
        ):
            kernels.bind({"bit_loss": form}, torch.device("cuda"))
    monkeypatch.setattr(kernels, "_compiler", lambda: False)
    with pytest.raises(UserError, match=r"train.kernels compiled .* needs a C\+\+ compiler"):
        kernels.bind({"bit_loss": "compiled"}, CPU)


def test_unknown_form() -> None:
    with pytest.raises(UserError, match=r"train.kernels = 'fast'"):
        load_config(overrides=["train.kernels=fast"])


def test_ranks_do_what_rank_0_has_measured() -> None:
    """Two devices of different names: the first one's row counts for both."""
    assert run_ranks(triton_checks.forms_of_rank, 2) == [True, True]


@pytest.mark.skipif(not kernels._compiler(), reason="torch.compile needs a C++ compiler")
def test_compiled_is_the_plain_form() -> None:
    compiled = kernels.bind({"bit_loss": "compiled"}, CPU).bit_loss
    case = next(case for case in bench.cases(CPU) if case.operation == "bit_loss")
    got, wanted = bench._compared(case, compiled), bench._compared(case, matched_filter.bit_loss)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_plain_models_import_no_triton(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom megatron_bit.config import load_config\nfrom megatron_bit.model.build import build_model\n"
        "from megatron_bit.parallel import groups\nbefore = 'triton' in sys.modules\n"
        "config = load_config(preset='laptop')\nbuild_model(config, 2**config.model.bits, groups.init(config))\n"
        "print(before, any(name.startswith('mbit_kernels.triton') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split()[1:] == ["False"], done
