"""`megatron-bit convert --from hf --to run`: a Hugging Face folder as a run with a checkpoint of step 0.

What `train.init_from` does at the start of a run, done once and kept: `train RUN` goes on from it at any layout.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bit.checkpoint.hf_parts import logical_shapes
from megatron_bit.checkpoint.huggingface import HuggingFaceWeights
from megatron_bit.checkpoint.index import Rectangle
from megatron_bit.checkpoint.save import file_name, write_part
from megatron_bit.config import Config, load_config, to_yaml
from megatron_bit.data.corpus import open_corpus
from megatron_bit.data.fit import fewest_bits
from megatron_bit.errors import UserError
from megatron_bit.inference.convert import check_free, give_name, temporary_folder
from megatron_bit.io.files import sync_folder, write_atomic
from megatron_bit.io.safetensors_file import Spec
from megatron_bit.model.codec import build_codec, learned_table
from megatron_bit.model.init import draw
from megatron_bit.optim.optimizer import EMA, STATES
from megatron_bit.run import checkpoints as folders
from megatron_bit.run.belongings import take_along
from megatron_bit.run.folder import with_absolute_paths
from megatron_bit.run.identity import identity
from megatron_bit.run.state import TrainState


def to_run(source: Path, run: Path, file: str | None, overrides: tuple[str, ...]) -> None:
    """Make the folder of a run that has the weights of `source`, no steps and no moments.

    Sizes, noise and code are those of the folder, the rest is `file` and `overrides`. One tensor is in memory at a
    time. The folder appears under its name when it is complete.

    Args:
        source: a converted BitLM, or a folder of the Llama layout, of which `train.init_from` says what is taken.

    Raises:
        UserError: the folder cannot be taken, the data is of another vocabulary or code, or the run's folder is there.
    """
    check_free(run)
    begin = time.perf_counter()
    weights = HuggingFaceWeights(source)
    config = with_absolute_paths(
        load_config(file, (*overrides, f"run={run}"), given=(str(source), weights.settings), fewest_bits=fewest_bits)
    )
    config.data.check_set()
    corpus = open_corpus(config.data, config.model.block_size, check=True)
    manifest, softmax = corpus.manifest, config.model.head.kind == "softmax"
    if softmax:
        manifest.need_vocabulary("model.head.kind=softmax")
    sized, m, code = config.with_vocab_size(manifest.vocab_size), config.model, "none"
    if not softmax:
        code = build_codec(m, manifest.vocab_size, learned_table(m.code, manifest, m.bits)).fingerprint
    mine = identity(config, corpus, code)
    weights.check(mine, str(source))
    meta = {
        "state": TrainState().to_json(),
        "step": 0,
        "updates": 0,
        "identity": mine,
        "layout": f"converted {source.name}",
        "config": config.model_dump(mode="json"),
    }
    try:
        with temporary_folder(run) as folder:
            size = _write_checkpoint(folder / "checkpoints", weights, sized, meta)
            write_atomic(folder / "identity.json", json.dumps(mine, indent=1).encode())
            write_atomic(folder / "config.yaml", to_yaml(config).encode())
            take_along(folder, config, manifest)
            sync_folder(folder)
            give_name(folder, run)
        sync_folder(run.parent)
    except OSError as error:
        raise UserError(f"output {run} cannot be written: {error.strerror or error} ({error.filename})") from None
    taken = f"the layers of {source}; embedding and head are untrained" if weights.partial else f"all of {source}"
    print(f"{run}: step 0 with {taken}, {size / 1e9:.3g} GB, {time.perf_counter() - begin:.1f} s")


def _write_checkpoint(root: Path, weights: HuggingFaceWeights, config: Config, meta: Mapping[str, Any]) -> int:
    """Masters, and moments of zero, as the only rank of a checkpoint of step 0; returns its bytes."""
    shapes = logical_shapes(config)
    states = (*STATES, EMA) if config.optim.ema_decay else STATES
    final = folders.step_folder(root, 0)
    temporary = final.with_suffix(folders.TEMPORARY)
    specs, index = [], {}
    for name, shape in shapes.items():
        offset = (0,) * len(shape)
        keys = {state: f"{name}/{state}/{'-'.join(map(str, offset))}" for state in states}
        specs += [Spec(key, shape, torch.float32) for key in keys.values()]
        places = {s: [{"file": file_name(0), "key": key, "offset": offset, "shape": shape}] for s, key in keys.items()}
        index[name] = {"shape": shape, "states": places}
    size = sum(spec.nbytes for spec in specs)
    root.mkdir()
    folders.fresh(temporary, int(size * 1.02))
    write_part(temporary, 0, specs, _tensors(weights, shapes, states, config), index)
    folders.commit(temporary, final, *folders.join(temporary, 1, lambda: True), meta)
    return size


def _tensors(
    weights: HuggingFaceWeights, shapes: Mapping[str, tuple[int, ...]], states: tuple[str, ...], config: Config
) -> Iterator[Tensor]:
    layer = ""
    for name, shape in shapes.items():
        if name.rpartition(".layers.")[2].partition(".")[0] != layer:
            layer = name.rpartition(".layers.")[2].partition(".")[0]
            weights.forget()
        if weights.has(name):
            master = weights.read(name, shape, Rectangle((0,) * len(shape), shape))
        else:
            master = draw(name, shape, config, torch.device("cpu"))
        for state in states:
            yield master if state in ("param", EMA) else torch.zeros(shape)
