"""The weights of a converted folder: one safetensors file, or shards of a bounded size with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from megatron_bit.io.safetensors_file import Spec, write_file


def plan_shards(specs: Sequence[Spec], shard_bytes: int) -> dict[str, list[Spec]]:
    """File name to its tensors, in the given order; a file is above `shard_bytes` only if one tensor is."""
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_shards(
    folder: Path,
    specs: Sequence[Spec],
    load: Callable[[str], Tensor],
    shard_bytes: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write all tensors, and model.safetensors.index.json if there is more than one file.

    Args:
        load: name to tensor (any floating dtype, or the one of its spec), called once for each, in order.
        progress: called with (bytes written, bytes in all) after every tensor.

    Raises:
        OSError: the folder cannot be written.
    """
    shards, done, total = plan_shards(specs, shard_bytes), 0, sum(spec.nbytes for spec in specs)

    def loaded(members: Sequence[Spec]) -> Iterator[Tensor]:
        nonlocal done
        for spec in members:
            yield load(spec.name).to(spec.dtype)
            done += spec.nbytes
            progress(done, total)

    for file, members in shards.items():
        write_file(folder / file, members, loaded(members), metadata={"format": "pt"})  # transformers asks for it
    if len(shards) > 1:
        weight_map = {spec.name: file for file, members in shards.items() for spec in members}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
