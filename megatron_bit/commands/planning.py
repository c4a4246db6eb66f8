"""`megatron-bit plan`. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from megatron_bit.commands.arguments import Args, split
from megatron_bit.errors import UserError


def plan(
    args: Annotated[Args, tyro.conf.arg(metavar="[CONFIG.yaml|RUN] [key=value ...]")] = (),
    preset: str | None = None,
    *,
    nodes: int = 1,
    gpus_per_node: int = 8,
    device: str = "h100",
    hardware: Path | None = None,
    top: int = 10,
    json: bool = False,
) -> int:
    """List the layouts in which a model can be trained on a cluster, with predicted memory, time and cost, best first.

    Tried are TP (inside a node), PP, chunks a rank (VPP), ZeRO stage, sequence parallelism, recomputation and the size
    of a micro-batch; the global batch and all else are the configuration's. Milliseconds of a step are those of the
    slowest pipeline stage: backbone and head (products, attention, memory traffic), TP, PP (bubble, sends) and DP
    (communication that nothing hides), optimizer. MFU counts causal attention half and no recomputation. GPU-hours are
    for `train.steps`. The last line selects the best layout in `train`.

    How well it predicts, and what it assumes: docs/planning.md. A softmax head needs model.vocab_size.

    Args:
        args: a YAML file or a run folder, then key=value pairs.
        preset: laptop, 125m, 1b, 8b or bitlm.
        nodes: number of nodes.
        gpus_per_node: GPUs of one node.
        device: a GPU whose facts are shipped: h100, h200 or a100.
        hardware: a YAML file with the facts of another device, instead of --device.
        top: layouts to list.
        json: print JSON.
    """
    from megatron_bit.planning.dry_run import with_vocabulary
    from megatron_bit.planning.hardware import load_hardware
    from megatron_bit.planning.report import as_dict, nothing_fits, table
    from megatron_bit.planning.search import Cluster, search
    from megatron_bit.run.folder import resolve

    target, overrides = split(args, preset)
    if target is None and preset is None:
        raise UserError(
            "plan needs CONFIG.yaml, a run folder or --preset; try `megatron-bit plan --preset 8b --nodes 8`"
        )
    for option, value in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node), ("--top", top)):
        if value < 1:
            raise UserError(f"{option} {value} has to be at least 1")
    config = with_vocabulary(resolve(target, overrides, preset))
    cluster = Cluster(load_hardware(device, hardware), nodes, gpus_per_node)
    found = search(config, cluster)
    if not found.candidates:
        raise UserError(nothing_fits(found, cluster))
    if json:
        from json import dumps

        print(dumps(as_dict(found, cluster, top), indent=1))
    else:
        print(table(found, cluster, top))
    return 0
