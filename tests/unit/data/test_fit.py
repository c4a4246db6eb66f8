"""`model.bits: auto`, and what of data and model is known not to fit before anything begins."""

from __future__ import annotations

from pathlib import Path

import manifests
import pytest

from megatron_bit.config import load_config
from megatron_bit.data.fit import fewest_bits
from megatron_bit.errors import UserError
from megatron_bit.planning.dry_run import with_vocabulary
from megatron_bit.run.folder import resolve


@pytest.mark.parametrize(("vocab_size", "bits"), [(2, 1), (256, 8), (257, 9), (4096, 12), (50_257, 16), (65_536, 16)])
def test_the_fewest_bits_of_a_vocabulary(vocab_size: int, bits: int, tmp_path: Path) -> None:
    manifests.bare(tmp_path / "data", vocab_size)
    assert fewest_bits(str(tmp_path / "data")) == bits


def test_auto_is_a_number_wherever_a_configuration_is_used(tmp_path: Path) -> None:
    manifests.bare(tmp_path / "data", 700)
    here = f"data.path={tmp_path / 'data'}"
    for preset, alone in (("laptop", 12), ("125m", 16)):
        assert resolve(None, (here,), preset).model.bits == 10
        assert resolve(None, (f"data.sources=[{{path: {tmp_path / 'data'}}}]",), preset).model.bits == 10
        assert resolve(None, (), preset).model.bits == alone  # what is planned without data
        assert resolve(None, (here, "model.bits=11"), preset).model.bits == 11
    assert resolve(None, (here,), "1b").model.bits == 17  # its preset says a number
    assert resolve(None, (here, "model.bits=auto"), "1b").model.bits == 10
    assert load_config(None, ["model.bits=auto"]).model.bits == 16
    assert load_config(None, ["model.bits=auto 9"]).model.bits == 9
    manifests.bare(tmp_path / "records", raw_bits=24)
    assert resolve(None, (f"data.path={tmp_path / 'records'}", "model.code=raw"), "laptop").model.bits == 24


@pytest.mark.parametrize("bits", ["automatic", "auto 1000", "auto -3", "auto 0", "AUTO"])
def test_what_is_not_auto(bits: str) -> None:
    with pytest.raises(UserError, match=r"model.bits = "):
        load_config(None, [f"model.bits={bits}"])


def test_auto_of_data_that_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.bits auto looks into a folder of this machine, .*s3://b/x; set model"):
        resolve(None, ("data.path=s3://b/x",), "laptop")
    with pytest.raises(UserError, match="none does not exist"):
        resolve(None, (f"data.path={tmp_path / 'none'}",), "laptop")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.bits=9"], "model.bits 9 is too small: the data has a vocabulary of 700 tokens"),
        (["model.code=semantic"], "model.code=semantic needs .*semantic-10.safetensors, which is not there"),
        (["model.code=raw"], "model.code is raw, and .* holds tokens of a vocabulary"),
    ],
)
def test_a_plan_says_that_the_data_do_not_fit(settings: list[str], said: str, tmp_path: Path) -> None:
    manifests.bare(tmp_path / "data", 700)
    with pytest.raises(UserError, match=said):
        with_vocabulary(resolve(None, (f"data.path={tmp_path / 'data'}", *settings), "laptop"))
