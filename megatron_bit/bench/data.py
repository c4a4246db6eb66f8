"""`megatron-bit bench data`: prepare against its tokenizer, the stream against webdataset and a memory map."""

from __future__ import annotations

import gc
import io
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron_bit.bench.spread import spread
from megatron_bit.data.batches import BatchStream
from megatron_bit.data.corpus import Corpus
from megatron_bit.data.manifest import FILE_NAME, Manifest, Split, load_manifest
from megatron_bit.data.stream import read_shard

SEQ_LENGTH, BATCH = 1024, 16
FEW, MANY = 10, 10_000  # shards to start with
SMALL_SHARD = 32 * SEQ_LENGTH  # tokens of one of those
OURS, PLAIN, MAPPED = "stream", "webdataset", "memory map"


def measure(
    inputs: tuple[str, ...], megabytes: int, tokenizer: Path | None, workers: tuple[int, ...], repeats: int
) -> dict[str, Any]:
    """The figures of both parts. Raises UserError as `prepare` does."""
    from mbit_data import bench as preparing

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = preparing.measure(inputs, megabytes, tokenizer, workers, repeats, folder)
        manifest = load_manifest(folder / "data")
        np.save(
            folder / "tokens.npy", np.concatenate([read_shard(manifest, s) for s in manifest.split("train").shards])
        )
        return {
            "prepare": prepared,
            "stream": _rates(manifest, folder / "tokens.npy", repeats),
            "fresh": _fresh(manifest, folder),
        }


def _stream(manifest: Manifest) -> BatchStream:
    return BatchStream(
        Corpus.of(manifest), "train", seq_length=SEQ_LENGTH, seed=1, global_batch_size=BATCH, micro_batch_size=BATCH,
        dp_rank=0, dp_size=1, prefetch=0,
    )  # fmt: skip


def _ours(manifest: Manifest, tokens: Path) -> Iterator[np.ndarray]:
    """One epoch in shuffled samples, as a rank of one has them."""
    stream = _stream(manifest)
    for batches in itertools.islice(stream.steps(0), stream.samples.before_repeat // BATCH):
        yield batches[0].tokens


def _webdataset(manifest: Manifest, tokens: Path) -> Iterator[np.ndarray]:
    """The documents as webdataset gives them, shard by shard: not shuffled, not cut into samples."""
    from webdataset.compat import WebDataset

    files = [str(manifest.shard_path(shard)) for shard in manifest.split("train").shards]
    for sample in WebDataset(files, shardshuffle=False):
        yield np.lib.format.read_array(io.BytesIO(sample["tokens.npy"]), allow_pickle=False)


def _memory_map(manifest: Manifest, tokens: Path) -> Iterator[np.ndarray]:
    """One epoch in shuffled samples out of one array on disk, as Megatron has it."""
    rows = np.load(tokens, mmap_mode="r")
    rows = rows[: len(rows) // SEQ_LENGTH * SEQ_LENGTH].reshape(-1, SEQ_LENGTH)
    order = np.random.default_rng(1).permutation(len(rows))
    for first in range(0, len(order) // BATCH * BATCH, BATCH):
        yield rows[order[first : first + BATCH]].astype(np.int64)


CONTENDERS: dict[str, Callable[[Manifest, Path], Iterator[np.ndarray]]] = {
    OURS: _ours,
    PLAIN: _webdataset,
    MAPPED: _memory_map,
}


def _rates(manifest: Manifest, tokens: Path, repeats: int) -> dict[str, Any]:
    """Tokens a second of CPU and of the clock, in turn, one thread; files in the page cache."""
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    clock: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for repeat in range(repeats + 1):
        for name in sorted(CONTENDERS, reverse=bool(repeat % 2)):
            gc.collect()
            cpu, begin = time.process_time(), time.perf_counter()
            count = sum(array.size for array in CONTENDERS[name](manifest, tokens))
            if repeat:  # the first of each warms up
                rates[name].append(count / (time.process_time() - cpu))
                clock[name].append(count / (time.perf_counter() - begin))
    split = manifest.split("train")
    return {
        "shards": len(split.shards),
        "tokens": split.tokens,
        "tokens_per_document": round(split.tokens / split.documents),
        "tokens_per_cpu_second": {name: spread(values) for name, values in rates.items()},
        "tokens_per_second": {name: spread(values) for name, values in clock.items()},
        "ratio": {
            name: spread([a / b for a, b in zip(rates[OURS], rates[name], strict=True)]) for name in (PLAIN, MAPPED)
        },
    }


def _fresh(manifest: Manifest, folder: Path) -> list[dict[str, Any]]:
    """Start-up, resume and memory in processes of their own, of small shards and of the ones that were prepared."""
    small = _many_shards(manifest, folder / "many")
    shards = manifest.split("train").shards
    cases = [(f"{FEW} small shards", small, FEW), (f"{MANY:,} small shards", small, MANY)]
    cases += [(f"{len(shards)} shards of {shards[0].tokens:,} tokens", manifest, len(shards))]
    context = multiprocessing.get_context("spawn")
    found = []
    for name, source, count in cases:
        here = folder / f"start{len(found)}"
        here.mkdir()
        chosen = source.split("train").shards[:count]
        for file in [shard.file for shard in chosen] + [source.tokenizer_file]:
            os.link(source.folder / file, here / file)
        text = replace(source, splits={"train": Split(chosen)}).to_json()
        (here / FILE_NAME).write_text(text, encoding="utf-8")
        with context.Pool(1) as pool:
            found.append({"data": name, **pool.apply(_start, (here,))})
    return found


def _many_shards(manifest: Manifest, folder: Path) -> Manifest:
    """A folder of MANY small shards: one, under as many names."""
    from mbit_data.tokenize import TokenizedDocument
    from mbit_data.write import SplitWriter

    folder.mkdir()
    tokens = read_shard(manifest, manifest.split("train").shards[0])
    tokens = np.resize(tokens, SMALL_SHARD)
    writer = SplitWriter(folder, "train", shard_tokens=SMALL_SHARD)
    for number, document in enumerate(np.split(tokens, 32)):
        writer.add(f"{number:06d}", TokenizedDocument("bench", number, document, 0, b"", 0))
    (shard,) = writer.finish().shards
    shards = tuple(replace(shard, file=f"small-{number:06d}.tar") for number in range(MANY))
    for copy in shards:
        os.link(folder / shard.file, folder / copy.file)
    os.link(manifest.tokenizer_path, folder / manifest.tokenizer_file)
    return replace(manifest, folder=folder, splits={"train": Split(shards)})


def _start(folder: Path) -> dict[str, float]:
    """In a new process: seconds to the first batch of a run and of a resumed one, and MB that a stream takes."""
    import webdataset.tariterators  # noqa: F401  (and torch, which a trainer has anyway)

    process = psutil.Process()
    before = process.memory_info().rss
    begin = time.perf_counter()
    manifest = load_manifest(folder)
    opened = time.perf_counter() - begin
    stream = _stream(manifest)
    next(stream.steps(0))
    first = time.perf_counter() - begin
    again = time.perf_counter()
    resumed = _stream(manifest)
    steps = resumed.steps(resumed.samples.before_repeat * 5 // 2)  # in the middle of the third epoch
    next(steps)
    resume = time.perf_counter() - again
    del stream
    most = 0
    for _ in range(2000):
        next(steps)
        most = max(most, process.memory_info().rss)
    return {
        "open_seconds": round(opened, 3),
        "first_batch_seconds": round(first, 3),
        "resume_seconds": round(resume, 3),
        "memory_mb": round((most - before) / 1e6, 1),
    }


def main(
    inputs: tuple[str, ...],
    megabytes: int,
    tokenizer: Path | None,
    workers: tuple[int, ...],
    repeats: int,
    as_json: bool,
) -> int:
    from mbit_data import bench as preparing

    result = measure(inputs, megabytes, tokenizer, workers, repeats)
    if as_json:
        print(json.dumps(result, indent=1))
        return 0
    print(preparing.render(result["prepare"]))
    print()
    print(_render(result, repeats))
    return 0


def _render(result: dict[str, Any], repeats: int) -> str:
    stream = result["stream"]
    lines = [
        f"{stream['tokens']:,} tokens in {stream['shards']} shards, {stream['tokens_per_document']:,} a document; "
        f"one thread, samples of {SEQ_LENGTH}",
        f"{'median of ' + str(repeats):24} {'M tokens/s of CPU':>24} {'M tokens/s of the clock':>28}",
    ]
    for name in CONTENDERS:
        texts = []
        for kind in ("tokens_per_cpu_second", "tokens_per_second"):
            rate = {key: value / 1e6 for key, value in stream[kind][name].items()}
            texts.append(f"{rate['median']:8.1f} ({rate['min']:.1f} to {rate['max']:.1f})")
        lines.append(f"{name:24} {texts[0]:>24} {texts[1]:>28}")
    for name, ratio in stream["ratio"].items():
        lines.append(f"stream / {name}, pair by pair: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
    lines += ["", f"{'in a new process':36} {'manifest':>9} {'1st batch':>10} {'resume':>9} {'memory':>10}"]
    for case in result["fresh"]:
        lines.append(
            f"{case['data']:36} {case['open_seconds']:7.2f} s {case['first_batch_seconds']:8.2f} s "
            f"{case['resume_seconds']:7.2f} s {case['memory_mb']:7.1f} MB"
        )
    return "\n".join(lines)
