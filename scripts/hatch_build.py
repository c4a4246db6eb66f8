"""What the build of a wheel adds: slurm/ as mbit_launcher/slurm_files, for `megatron-bit cluster profiles`.

Not as a `force-include` of pyproject.toml, which an editable installation obeys too: a folder mbit_launcher would stand
in site-packages and hide the one that is edited.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class SlurmFiles(BuildHookInterface):
    """Hatchling finds it by its base class."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """version: "standard", or "editable"."""
        if version == "standard":
            build_data["force_include"]["slurm"] = "mbit_launcher/slurm_files"
