"""`megatron-bit convert --to hf`: a checkpoint as a folder for transformers, on machines without this project.

A BitLM takes its code along; a softmax model becomes an ordinary Qwen3 or Llama.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_bit.data.tokenizer import Tokenizer
from megatron_bit.errors import UserError
from megatron_bit.inference.card import write_card
from megatron_bit.inference.hf_names import CODE_TABLE, Source, WeightsOf, model_arguments, softmax_config
from megatron_bit.inference.safetensors_stream import Spec, write_shards
from megatron_bit.io.files import sync_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
CODE = sorted((Path(__file__).parent / "hf").glob("*_bitlm.py"))  # goes with every BitLM


def to_hf(
    run: Path,
    out: Path,
    *,
    dtype: str = "float32",
    shard_size: str = "5GB",
    data: str | None = None,
    weights: WeightsOf = "trained",
) -> None:
    """Convert the newest checkpoint of a run, or a checkpoint folder.

    Tensor by tensor: memory is that of the largest one, whatever the model. The folder appears under its name when it
    is complete.

    Args:
        out: folder to make.
        dtype: of the weights, a key of DTYPES.
        shard_size: above it there are several files: "5GB", "500MiB".
        data: the run's data folder, if it has moved.
        weights: the newest ones, or their running average.

    Raises:
        UserError: no checkpoint, another tokenizer, an output folder with something in it, or it cannot be written.
    """
    shard_bytes = _bytes(shard_size)
    check_free(out)
    source = Source(run, data, weights)
    begin = time.perf_counter()
    try:
        with temporary_folder(out) as folder:
            _write_small_files(source, folder, dtype)
            write_card(source, folder, out.name)
            written = _write_weights(source, folder, DTYPES[dtype], shard_bytes)
            sync_folder(folder)
            give_name(folder, out)
        sync_folder(out.parent)
    except OSError as error:
        raise UserError(f"output {out} cannot be written: {error.strerror or error} ({error.filename})") from None
    print(
        f"{out}: step {source.step} of {source.folder.parent.parent}, {written / 1e9:.3g} GB of "
        f"{'averaged ' if weights == 'ema' else ''}weights in {dtype}, {time.perf_counter() - begin:.1f} s"
    )


def _write_small_files(source: Source, folder: Path, dtype: str) -> None:
    common: dict[str, Any] = {
        "dtype": dtype,
        "training_step": source.step,
        "tokenizer_sha256": source.identity["tokenizer"],  # of the data folder's file; "" of records, which have none
        "code_fingerprint": source.identity["code table"],  # as in a run's identity.json; "none" of a softmax
    }
    if source.weights != "trained":
        common["training_weights"] = source.weights
    if source.records:
        _write_bitlm(source, folder, common)
        return
    from megatron_bit.inference.tokenizer_json import convert_tokenizer, fingerprint

    tokenizer = Tokenizer(source.manifest.checked_tokenizer_path())
    eos = tokenizer.eos_id
    fast = convert_tokenizer(tokenizer)
    if source.softmax:
        _begin_with(fast, eos)
    fast.save(str(folder / "tokenizer.json"))
    common |= {"eos_token_id": eos, "pad_token_id": eos, "tokenizer_fingerprint": fingerprint(folder)}
    if source.softmax:
        _write_llama(source, folder, common)
    else:
        _write_bitlm(source, folder, common)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": fast.id_to_token(eos),
        "pad_token": fast.id_to_token(eos),
        **({"bos_token": fast.id_to_token(eos)} if source.softmax else {}),
        "padding_side": "left",
        "split_special_tokens": True,  # what looks like </s> in a text is text
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


def _write_bitlm(source: Source, folder: Path, common: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    from megatron_bit.inference.hf.configuration_bitlm import BitLMConfig

    arguments: dict[str, Any] = model_arguments(source.config, source.vocab_size, source.noise_table)
    BitLMConfig(
        **arguments,
        **common,
        architectures=["BitLMForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_bitlm.BitLMConfig",
            "AutoModelForCausalLM": "modeling_bitlm.BitLMForCausalLM",
        },
    ).save_pretrained(folder)
    ends = {key: common[key] for key in ("eos_token_id", "pad_token_id") if key in common}  # records have none
    GenerationConfig(**ends, max_new_tokens=128, do_sample=True, **source.config.generation).save_pretrained(folder)
    for file in CODE:
        shutil.copyfile(file, folder / file.name)


def _begin_with(tokenizer: Any, eos: int) -> None:
    """Have the end-of-document token put in front of every text: a softmax's position 0 was trained on it."""
    from tokenizers.processors import TemplateProcessing

    token = tokenizer.id_to_token(eos)
    tokenizer.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=[(token, eos)])


def _write_llama(source: Source, folder: Path, common: dict[str, Any]) -> None:
    """A softmax model is a Qwen3, or a Llama without norms of queries and keys: no code has to go with it."""
    import transformers

    eos = common["eos_token_id"]
    made = softmax_config(source.config, **common, bos_token_id=eos)
    made.rope_theta = source.config.model.rope_base  # where transformers 4 looks for it; 5 has rope_parameters
    made.save_pretrained(folder)
    generation = transformers.GenerationConfig(
        bos_token_id=eos, eos_token_id=eos, pad_token_id=eos, max_new_tokens=128, do_sample=True
    )
    generation.save_pretrained(folder)


def _write_weights(source: Source, folder: Path, dtype: torch.dtype, shard_bytes: int) -> int:
    specs = [Spec(part.name, part.shape, dtype) for part in source.parts()]
    if source.code_table is not None:
        specs.append(Spec(CODE_TABLE, tuple(source.code_table.shape), torch.int8))
    tensors = source.tensors()

    def load(name: str) -> torch.Tensor:
        got, tensor = next(tensors)
        assert got == name, (got, name)
        return tensor

    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 2.0:
            last = time.monotonic()
            print(f"{done / 1e9:.1f} of {total / 1e9:.1f} GB", file=sys.stderr, flush=True)

    write_shards(folder, specs, load, shard_bytes, progress)
    return sum(spec.nbytes for spec in specs)


def check_free(out: Path) -> None:
    """UserError if the output is there and has something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"output {out} exists and is not an empty folder; give another name, or remove it")


def give_name(folder: Path, out: Path) -> None:
    """Give a finished folder its name: all of it or nothing appears. UserError if something is there by now."""
    try:
        os.rename(folder, out)  # also over an empty folder, and over nothing else
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise UserError(
                f"output {out} was made by somebody else meanwhile, and is left as it is; give another name"
            ) from None
        raise


@contextlib.contextmanager
def temporary_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, removed at the end if it is still there."""
    folder = out.absolute().with_name(f"{out.absolute().name}.partial-{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if not match or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"--shard-size {text} is not a size; write for example 5GB or 500MiB")
    return int(float(match[1]) * _UNITS[match[2]])
