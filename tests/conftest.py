"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data folder of real text (part of the standard library), vocabulary 421."""
    import email
    import json as module

    from mbit_data.prepare import PrepareOptions, prepare

    folder = tmp_path_factory.mktemp("data") / "tiny"
    inputs = tuple(str(Path(m.__file__).parent) for m in (module, email))
    prepare(
        PrepareOptions(
            inputs=inputs, out=folder, vocab_size=421, validation_fraction=0.2, shard_tokens=40_000, workers=1
        ),
        progress=False,
    )
    return folder
