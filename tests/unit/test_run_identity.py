"""What makes two starts the same run: keys that are younger than a run count as what it had."""

from pathlib import Path

import pytest

from megatron_bit.config import load_config
from megatron_bit.data.corpus import Corpus
from megatron_bit.data.manifest import Manifest, Split
from megatron_bit.errors import UserError
from megatron_bit.run_folder import compare, identity


def made(*overrides: str, folder: str = "x") -> dict:
    manifest = Manifest(Path(folder), {"train": Split(())}, "t", "0", 300, 2, "uint16", {}, "0")
    config = load_config(overrides=["model.head.kind=diffusion", *overrides])
    return identity(config, Corpus.of(manifest), "code")


def test_self_conditioning_is_part_of_a_run():
    """Its weights are; how often training shows the estimate may change."""
    without, shown = made(), made("diffusion.self_condition=0.5")
    compare(made("diffusion.self_condition=0.3"), shown, "run")
    for there, mine in ((without, shown), (shown, without)):
        with pytest.raises(UserError, match=r"run is of another run: diffusion.self_condition above 0 is "):
            compare(there, mine, "run")


def test_a_run_of_before_the_key_had_none():
    old = made()
    del old["diffusion.self_condition above 0"]
    compare(old, made(), "run")
    with pytest.raises(UserError, match=r"diffusion.self_condition above 0 is False there and True here"):
        compare(old, made("diffusion.self_condition=1"), "run")
