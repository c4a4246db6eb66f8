"""Half of `megatron-bit bench data`: what preparing costs, against the tokenizer alone on the same text."""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbit_data.inputs import expand_inputs
from mbit_data.options import DEFAULT_SAMPLE_BYTES, DEFAULT_VOCAB_SIZE, PrepareOptions
from mbit_data.prepare import prepare
from mbit_data.read import read_documents
from mbit_data.train_tokenizer import sample_texts, train_tokenizer
from megatron_bit.data.tokenizer import Tokenizer
from megatron_bit.errors import UserError


def measure(
    inputs: Sequence[str], megabytes: int, tokenizer: Path | None, workers: Sequence[int], repeats: int, folder: Path
) -> dict[str, Any]:
    """Medians over `repeats` of MB (10^6 bytes of UTF-8 text) and tokens a second: the tokenizer alone in this process
    on text in memory, then whole prepares of the same text from disk, without training a tokenizer, in turn.

    Everything is written below `folder`; the last prepare stays there as `data`. Raises UserError for inputs without
    text, and what `prepare` raises.
    """
    texts = list(_texts(inputs, megabytes * 10**6))
    if not texts:
        raise UserError("bench data: there is no text in the inputs")
    text_bytes = sum(len(text.encode()) for text in texts)
    source, out = folder / "text", folder / "data"
    source.mkdir()
    for number, text in enumerate(texts):
        (source / f"{number:06d}.text").write_text(text, encoding="utf-8", newline="")
    given = tokenizer or folder / "tokenizer.model"
    if tokenizer is None:
        sample = sample_texts(expand_inputs([str(source)]), DEFAULT_SAMPLE_BYTES)
        given.write_bytes(train_tokenizer(sample, DEFAULT_VOCAB_SIZE, "bpe"))
    model = Tokenizer(given)
    seconds: dict[str, list[float]] = {}
    tokens = 0
    for _ in range(repeats):
        begin = time.perf_counter()
        tokens = sum(len(model.encode(text)) + 1 for text in texts)
        seconds.setdefault("tokenizer alone", []).append(time.perf_counter() - begin)
        for count in workers:
            shutil.rmtree(out, ignore_errors=True)
            begin = time.perf_counter()
            prepare(PrepareOptions((str(source),), out, given, workers=count), progress=False)
            name = f"prepare, {count} worker{'s' * (count > 1)}"
            seconds.setdefault(name, []).append(time.perf_counter() - begin)
    return {
        "documents": len(texts),
        "text_bytes": text_bytes,
        "tokens": tokens,
        "vocab_size": model.vocab_size,
        "cpus": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),  # what else the machine was doing
        "repeats": repeats,
        "results": {name: _rates(text_bytes, tokens, times) for name, times in seconds.items()},
    }


def render(result: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        f"{result['text_bytes'] / 1e6:.1f} MB, {result['documents']:,} documents, {result['tokens']:,} tokens of a "
        f"vocabulary of {result['vocab_size']:,}; {result['cpus']} CPUs, load average {result['load_average']}",
        f"{'median of ' + str(result['repeats']):24} {'s':>8} {'MB/s':>8} {'tokens/s':>12}",
    ]
    for name, row in result["results"].items():
        rates = f"{row['megabytes_per_second']:8.2f} {row['tokens_per_second']:12,}"
        lines.append(f"{name:24} {row['seconds']:8.2f} {rates}   ({row['fastest']:.2f} to {row['slowest']:.2f} s)")
    return "\n".join(lines)


def _texts(inputs: Sequence[str], budget: int):
    left = budget
    documents = itertools.chain.from_iterable(map(read_documents, expand_inputs(inputs)))
    for document in documents:
        if left <= 0:
            return
        if document.text.strip():
            left -= len(document.text.encode())
            yield document.text


def _rates(text_bytes: int, tokens: int, times: list[float]) -> dict[str, Any]:
    middle = statistics.median(times)
    return {
        "seconds": round(middle, 6),
        "fastest": round(min(times), 3),
        "slowest": round(max(times), 3),
        "megabytes_per_second": round(text_bytes / 1e6 / middle, 3),
        "tokens_per_second": int(tokens / middle),
    }
