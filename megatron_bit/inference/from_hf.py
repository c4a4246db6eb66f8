"""`megatron-bit convert --from hf --to run`: a Hugging Face folder as a run with a checkpoint of step 0.

What `train.init_from` does at the start of a run, done once and kept: `train RUN` goes on from it at any layout.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bit.checkpoint import folder as folders
from megatron_bit.checkpoint.huggingface import BITLM, HuggingFaceWeights, layer_settings, read_json
from megatron_bit.checkpoint.index import Rectangle
from megatron_bit.checkpoint.init_from import check_bitlm
from megatron_bit.checkpoint.save import file_name, write_part
from megatron_bit.config import Config, ModelConfig, load_config, to_yaml
from megatron_bit.data.corpus import open_corpus
from megatron_bit.errors import UserError
from megatron_bit.files import sync_folder, write_atomic
from megatron_bit.inference.convert import check_free, temporary_folder
from megatron_bit.inference.hf_names import logical_shapes
from megatron_bit.model.codec import CODES, Codec, build_codec, learned_table
from megatron_bit.model.init import draw
from megatron_bit.optim.optimizer import EMA, STATES
from megatron_bit.run_folder import identity
from megatron_bit.safetensors_file import Spec
from megatron_bit.state import TrainState


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
    config = load_config(file, (*overrides, f"run={run}"), given=(str(source), _settings(source)))
    config.data.check_set()
    corpus = open_corpus(config.data, config.model.block_size, check=True)
    manifest, softmax = corpus.manifest, config.model.head.kind == "softmax"
    if softmax:
        manifest.need_vocabulary("model.head.kind=softmax")
    sized = config.with_vocab_size(manifest.vocab_size)
    weights, code = HuggingFaceWeights(source, sized.model), "none"
    if not softmax:
        m = config.model
        codec = build_codec(m, manifest.vocab_size, learned_table(m.code, manifest, m.bits))
        if weights.kind == BITLM:
            check_bitlm(weights, config, codec.table if isinstance(codec, Codec) else None)
        code = codec.fingerprint
    mine = identity(config, corpus, code)
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
            sync_folder(folder)
            os.rename(folder, run)
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


def _settings(source: Path) -> dict[str, Any]:
    """The configuration that a folder's config.json decides, as a tree."""
    path = source / "config.json"
    if not path.exists():
        raise UserError(f"{source} has no config.json, so it is no Hugging Face folder; give one that `convert` made")
    there = read_json(path)
    try:
        if there.get("model_type") != BITLM:
            return {"model": layer_settings(there)}  # other kinds are refused when it is opened
        return _bitlm_settings(source, there)
    except KeyError as error:
        raise UserError(f"{path} has no {error.args[0]}") from None


def _bitlm_settings(source: Path, there: Mapping[str, Any]) -> dict[str, Any]:
    """What inference/hf_names.py makes of a configuration, the other way round."""
    head = {
        "kind": there["head_kind"],
        "prior": there["head_prior"],
        "window": there["head_window"],
        "num_layers": there["head_num_layers"],
        "hidden_size": there["head_hidden_size"],
        "num_heads": there["head_num_attention_heads"],
        "ffn_hidden_size": there["head_intermediate_size"],
    }
    model = {
        **layer_settings(there),
        "bits": there["bits"],
        "code": _code(source, there),
        "group_bits": max(there["group_sizes"]),
        "block_size": there["block_size"],
        "attention": "block_causal" if there["block_causal"] else "causal",
        "init_std": there["initializer_range"],
        "head": head,
    }
    diffusion = {
        "parameterization": "matched_filter" if there["matched_filter"] else "direct",
        "sigma_min": there["sigma_min"],
        "sigma_max": there["sigma_max"],
        "log_mean": there["sigma_log_mean"],
        "log_std": there["sigma_log_std"],
        "noise": there["sigma_kind"],
        "condition_drop": there["condition_drop"],
        "self_condition": 0.5 if there["self_condition"] else 0.0,
    }
    return {"model": model, "diffusion": diffusion, "data": {"seq_length": there["max_position_embeddings"]}}


def _code(source: Path, there: Mapping[str, Any]) -> str:
    """The value of model.code that makes the folder's table; one that is none of CODES was learned."""
    if not there["vocab_size"]:
        return "raw"
    table = HuggingFaceWeights(source, ModelConfig()).code_table()
    for code in CODES:
        if torch.equal(Codec(code, len(table), table.shape[1]).table, table):
            return code
    return "semantic"
