"""What a planner has to know of a device and of the links between devices. The facts stand in hardware.yaml."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from megatron_bit.config import Section, read_yaml, validated
from megatron_bit.errors import UserError

Precision = Literal["fp32", "bf16", "fp8"]


class Hardware(Section):
    peak_flops: dict[Precision, float]
    """Dense FLOP/s of matrix products, by precision."""
    memory: float = Field(gt=0)
    """Bytes of one device."""
    memory_bandwidth: float = Field(gt=0)
    """Bytes/s of its memory."""
    memory_efficiency: float = Field(default=0.87, gt=0, le=1)
    """Share of that which a copy reaches."""
    intra_bandwidth: float = Field(gt=0)
    """Bytes/s that one device sends to the others of its node."""
    intra_latency: float = Field(default=30e-6, ge=0)
    """Seconds of a collective inside a node, beyond its bytes."""
    inter_bandwidth: float = Field(gt=0)
    """Bytes/s that one device sends to other nodes: its share of the network cards."""
    inter_latency: float = Field(default=5e-6, ge=0)
    """Seconds of a hop from one node to another, beyond its bytes."""
    matmul_efficiency: dict[Precision, float]
    """Share of the peak that large matrix products reach in training."""
    attention_efficiency: float = Field(gt=0, le=1)
    """Share of the peak that attention reaches; it is computed in bf16 under fp8."""
    kernel_seconds: float = Field(default=5e-6, ge=0)
    """Seconds of a matrix product beyond its FLOPs."""

    @model_validator(mode="after")
    def _check(self) -> Hardware:
        for name, flops in self.peak_flops.items():
            if flops <= 0:
                raise ValueError(f"peak_flops of {name} {flops} has to be above 0")
        for name, share in self.matmul_efficiency.items():
            if not 0 < share <= 1:
                raise ValueError(f"matmul_efficiency of {name} {share} has to be above 0 and at most 1")
            if name not in self.peak_flops:
                raise ValueError(f"matmul_efficiency has {name}, and peak_flops has not; give both or none")
        if "fp8" in self.matmul_efficiency and "bf16" not in self.matmul_efficiency:
            raise ValueError("fp8 without bf16, which the head is computed in; give bf16 as well")
        return self

    def precision(self, name: str) -> Precision:
        """What `train.precision` is computed in; fp8_emulated is bf16. UserError if the device does not have it."""
        found: Precision = "bf16" if name == "fp8_emulated" else name  # type: ignore[assignment]
        if found not in self.matmul_efficiency:
            raise UserError(
                f"train.precision {name} has no peak_flops and matmul_efficiency on this hardware, which has "
                f"{', '.join(sorted(self.matmul_efficiency))}; use one of those"
            )
        return found

    def attainable(self, precision: Precision) -> float:
        """FLOP/s of large matrix products."""
        return self.peak_flops[precision] * self.matmul_efficiency[precision]

    @property
    def copy_bandwidth(self) -> float:
        return self.memory_bandwidth * self.memory_efficiency


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a device as its driver calls it ("NVIDIA H200"); None if it is not known."""
    facts = _facts()
    peaks = {**{name: known["peak_flops"]["bf16"] for name, known in facts["devices"].items()}, **facts["other_peaks"]}
    return next((float(peak) for name, peak in peaks.items() if name in device.lower()), None)


def load_hardware(device: str, path: Path | None = None) -> Hardware:
    """A shipped device, or the one in a YAML file with the keys of `Hardware`. UserError in one line."""
    if path is not None:
        tree = read_yaml(path, "hardware", "give a YAML file with the keys of docs/planning.md")
        return validated(Hardware, tree, dict.fromkeys(tree, str(path)))
    shipped = _facts()["devices"]
    if device not in shipped:
        raise UserError(
            f"--device {device} is not known; choose one of {', '.join(sorted(shipped))}, or --hardware FILE"
        )
    return validated(Hardware, shipped[device], {})


def _facts() -> dict[str, Any]:
    return yaml.safe_load(resources.files("megatron_bit.planning").joinpath("hardware.yaml").read_text())
