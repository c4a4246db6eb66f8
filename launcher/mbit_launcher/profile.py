"""A cluster profile: the YAML file that says how jobs are made on one cluster. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from megatron_bit.config import Section, TextYaml, read_yaml, validated
from megatron_bit.errors import UserError
from megatron_bit.io.paths import user_location
from megatron_bit.io.text import acts

PREFIX = "cluster."  # of key=value pairs that belong to the profile


class Container(Section):
    """pyxis: options of srun. The launcher's own Python then runs in the container as well."""

    image: str
    """What `--container-image` takes: an enroot image file on a shared disk, or `registry#image:tag`."""
    mounts: tuple[str, ...] = ()
    """`/host:/inside` folders; the run folder and the data have to be among them, under their own names."""
    options: tuple[str, ...] = ()
    """More options of srun, such as `--container-writable`."""


class Preflight(Section):
    """What every node is asked before an attempt. A node that fails is named, and excluded from the next attempts."""

    enabled: bool = True
    max_gpu_memory_mib: int = Field(default=2048, ge=0)
    """A GPU that already holds more is not idle."""
    min_free_gib: float = Field(default=5.0, ge=0)
    """Free disk in the run folder and in the node's own temporary folder."""
    max_clock_skew_seconds: float = Field(default=30.0, gt=0)
    """Of a node's clock against the others'; tasks do not start at one instant, so it cannot be small."""
    timeout_seconds: int = Field(default=120, ge=1)


class ClusterProfile(Section):
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: int = Field(default=1, ge=1)
    time: str = "24:00:00"
    """Limit of one attempt, as SLURM writes it: minutes, H:M:S, or D-H:M:S. The job goes back into the queue then."""
    gpus_per_node: int = Field(default=0, ge=0)
    ranks_per_node: int | None = Field(default=None, ge=1)
    """Default: one a GPU; has to be said without GPUs."""
    gpu_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of one GPU; a run whose estimate is larger is refused."""
    cpus_per_node: int | None = Field(default=None, ge=1)
    memory: str | None = None
    """`--mem` of a node, such as 0 for all of it, or 64G."""
    exclusive: bool = False
    exclude: str | None = None
    """Nodes never to use, as SLURM writes them: n[3-5],n9."""
    switches: str | None = None
    """`--switches`: leaf switches at most, such as 1, or 1@30:00 to wait for it no longer than that."""
    segment: int | None = Field(default=None, ge=1)
    """`--segment`: nodes that have to be in one block (SLURM 24.05, topology/block)."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, each one word: `--constraint=h100`."""
    srun: tuple[str, ...] = ()
    """More options of srun for the training step: `--cpu-bind=none`."""
    container: Container | None = None
    modules: tuple[str, ...] = ()
    """`module load` each."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of the job, NCCL_... among them; nothing else of your shell gets there."""
    python: str | None = None
    """The interpreter, the same path on every node. Default: the one that submits; python3 in a container."""

    save_seconds: int = Field(default=120, ge=10, le=65000)
    """SLURM says this long before the limit that it comes (up to 60 s earlier); the ranks then save and leave."""
    hang_timeout: float = Field(default=300.0, gt=0)
    """Seconds without a new step after which an attempt is ended and started again. Validation and the last save have
    to fit in; `parallel.timeout_minutes` has to be longer, or the ranks give up before their stacks are written."""
    start_timeout: float = Field(default=1800.0, gt=0)
    """The same before the first step: import, compile, read a checkpoint."""
    max_restarts: int = Field(default=100, ge=0)
    """How often one submission goes back into the queue, for whatever reason."""
    cordon: str | None = None
    """File of bad nodes, shared by all runs that name it. Default: RUN/slurm/cordon."""
    preflight: Preflight = Preflight()

    @model_validator(mode="before")
    @classmethod
    def _one_line(cls, tree: Any) -> Any:
        """A line break in a value would become a line of the script, which bash runs."""
        for key, text in _texts(tree):
            if acts(text):
                raise ValueError(f"{key} {text!r} has a control character or a line break in it; remove it")
        return tree

    @model_validator(mode="after")
    def _check(self) -> ClusterProfile:
        if not self.gpus_per_node and self.ranks_per_node is None:
            raise ValueError("gpus_per_node is 0, so ranks_per_node has to be set: the processes of a node")
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"ranks_per_node {self.ranks_per_node} with gpus_per_node {self.gpus_per_node}: every GPU has one "
                "rank; leave ranks_per_node out"
            )
        if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", self.time):
            raise ValueError(f"time {self.time!r} is none that SLURM reads; write minutes, H:M:S or D-H:M:S")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"environment {name!r} is no name of a variable; use letters, digits and _")
        for key in ("sbatch", "srun"):
            for word in getattr(self, key):
                if not word.startswith("-"):
                    raise ValueError(f"{key} {word!r} is no option; write each as one word, such as --constraint=h100")
        return self

    @property
    def ranks(self) -> int:
        """Ranks of one node."""
        return self.ranks_per_node or self.gpus_per_node

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a tree with its dotted key, the keys of mappings among them."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, Mapping):
        for name, value in node.items():
            yield key or "key", str(name)
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value, key)


def split_overrides(overrides: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(key=value pairs of the configuration, those of the profile without their `cluster.`)."""
    mine = tuple(o.removeprefix(PREFIX) for o in overrides if o.startswith(PREFIX))
    return tuple(o for o in overrides if not o.startswith(PREFIX)), mine


def load_profile(path: Path, overrides: Sequence[str] = ()) -> ClusterProfile:
    """Read a profile; `overrides` are key=value pairs. Raises UserError in one line."""
    # As text, which pydantic turns into numbers where a key wants one: YAML would read 1:30:00 in base 60.
    tree = read_yaml(
        path, "cluster profile", "give a YAML file; `megatron-bit cluster profiles` has examples", TextYaml
    )
    origin = dict.fromkeys(tree, str(path))
    for override in overrides:
        key, _, text = override.partition("=")
        *sections, leaf = key.split(".")
        target: Any = tree
        for section in sections:
            target = target.setdefault(section, {}) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            raise UserError(f"{PREFIX}{key}: {PREFIX}{sections[-1]} has no keys below it")
        try:
            target[leaf] = yaml.load(text, Loader=TextYaml)
        except (yaml.YAMLError, RecursionError, ValueError):
            target[leaf] = text
        origin[key] = "command line"
    profile = validated(
        ClusterProfile, {k: _unset(v) if k != "environment" else v for k, v in tree.items()}, origin, PREFIX
    )
    return _expanded(profile)


def _expanded(profile: ClusterProfile) -> ClusterProfile:
    """Its paths as the user means them, by the environment of the shell that submits."""

    def place(key: str, text: str | None) -> str | None:
        try:
            return None if text is None else user_location(text)
        except UserError as error:
            raise UserError(f"{PREFIX}{key} = {text}: {error}") from None

    def mount(text: str) -> str:  # /host:/inside
        host, colon, inside = text.partition(":")
        return f"{place('container.mounts', host)}{colon}{inside}"

    changes: dict[str, Any] = {key: place(key, getattr(profile, key)) for key in ("python", "cordon")}
    if profile.container is not None:
        mounts = tuple(map(mount, profile.container.mounts))
        image = place("container.image", profile.container.image)
        changes["container"] = profile.container.model_copy(update={"image": image, "mounts": mounts})
    return profile.model_copy(update=changes)


def _unset(value: Any) -> Any:
    """None for what is written as nothing."""
    if isinstance(value, dict):
        return {key: _unset(inner) for key, inner in value.items()}
    return None if value in ("", "~", "null") else value
