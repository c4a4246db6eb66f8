"""`megatron-bit bench generate`: tokens a second against softmax models of the same backbone, in one run.

Two of them, with transformers' cache: what `convert` makes of a run with `model.head.kind=softmax`, and a Llama.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
from transformers.utils import logging as transformers_logging

from megatron_bit.bench.machine import machine
from megatron_bit.bench.spread import spread
from megatron_bit.config import Config
from megatron_bit.errors import UserError
from megatron_bit.inference.generate import Generator, check_compiler
from megatron_bit.inference.hf.configuration_bitlm import BitLMConfig
from megatron_bit.inference.hf.modeling_bitlm import BitLMForCausalLM
from megatron_bit.inference.hf_names import Source, model_arguments, softmax_config, training_dtype

PEERS = ("softmax peer", "Llama")


def main(
    config: Config,
    *,
    vocab_size: int,
    batches: Sequence[int],
    steps: Sequence[int],
    ahead: Sequence[int] = (0,),
    run: Path | None = None,
    dtype: str | None = None,
    compiled: bool = False,
    tokens: int,
    prompt: int,
    repeats: int,
    as_json: bool,
) -> int:
    """Time all models in turn; print medians and ratios.

    They are untrained: speed does not depend on the weights, but for how often a guess is right (`ahead`). With `run`
    the BitLM is that of a run, and the others have its sizes; prompts are its own text.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformers_logging.set_verbosity_error()
    bitlm: Any = _bitlm(config, vocab_size)
    if run is not None:
        source = Source(run)
        if source.softmax or source.records:
            raise UserError(f"--run {run} is no BitLM of text; give one, or leave it out")
        config, vocab_size, bitlm = source.config, source.vocab_size, Generator(run).model
    precision: torch.dtype = getattr(torch, dtype) if dtype else training_dtype(config)
    peer_config = softmax_config(config.with_vocab_size(vocab_size))
    peers = dict(zip(PEERS, (_causal(peer_config), _causal(_llama(peer_config))), strict=True))
    for model in (bitlm, *peers.values()):
        model.to(device=device, dtype=precision)
    cache = {}
    if compiled:
        check_compiler(device)
        cache = {"cache_implementation": "static"}
        bitlm.compile_parts()
        for peer in peers.values():
            peer.forward = torch.compile(peer.forward, fullgraph=True)
    rows = []
    for batch in batches:
        ids = torch.randint(0, vocab_size, (batch, prompt), device=device)
        if run is not None:
            ids = bitlm.generate(ids[:, :0], max_new_tokens=prompt, eos_token_id=[])
        ways: dict[str, dict[str, Any]] = {f"BitLM, {count} steps": {"steps": count} for count in steps}
        if config.model.head.kind == "chain":
            ways = {f"BitLM, chain{f', {n} ahead' if n else ''}": {"ahead": n} for n in ahead}
        evaluations = {name: _evaluations(bitlm, ids, tokens, how) for name, how in ways.items()}
        runs: dict[str, Callable[[], Any]] = {
            name: lambda how=how, ids=ids: bitlm.generate(ids, max_new_tokens=tokens, eos_token_id=[], **how)
            for name, how in ways.items()
        }
        for name, peer in peers.items():
            runs[name] = lambda ids=ids, peer=peer: peer.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                **cache,
            )  # fmt: skip
        for row in _measure(runs, batch, tokens, repeats, device):
            rows.append({**row, "evaluations": evaluations.get(row["model"])})
    result = {
        "machine": f"{machine(torch.cuda.get_device_name() if device.type == 'cuda' else '')}, {precision}"
        f"{', compiled' * compiled}",
        "model": f"{config.model.num_layers} layers of {config.model.hidden_size}, K={config.model.block_size}, "
        f"{config.model.head.kind} head {config.model.head.num_layers} of {config.model.head.hidden_size}, "
        f"{len(config.model.group_sizes)} groups of bits, vocabulary {vocab_size}; "
        f"prompt {prompt}, {tokens} new tokens",
        "parameters": {name: _count(model) for name, model in {"BitLM": bitlm, **peers}.items()},
        "rows": rows,
    }
    print(json.dumps(result, indent=1) if as_json else _table(result))
    return 0


def _evaluations(bitlm: Any, ids: torch.Tensor, tokens: int, how: dict[str, Any]) -> float:
    """Evaluations of the head for one block, of a text of `tokens` tokens behind `ids`."""
    count, name = 0, "groups" if bitlm.config.head_kind == "chain" else "forward"
    plain, prompt = getattr(bitlm.head, name), len(bitlm.config.group_sizes) if name == "groups" else 0

    def counted(*given: Any) -> Any:
        nonlocal count
        count += 1
        return plain(*given)

    setattr(bitlm.head, name, counted)
    bitlm.generate(ids, max_new_tokens=tokens, eos_token_id=[], **how)
    setattr(bitlm.head, name, plain)
    return (count - prompt) / -(-tokens // bitlm.config.block_size)


def _bitlm(config: Config, vocab_size: int) -> BitLMForCausalLM:
    model = BitLMForCausalLM(BitLMConfig(**model_arguments(config, vocab_size))).eval()  # type: ignore[arg-type]
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    return model


def _causal(config: Any) -> Any:
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model


def _llama(peer: Any) -> LlamaConfig:
    """Of the same shape as the peer, without what else it has."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names = (*names, "num_key_value_heads", "max_position_embeddings")
    return LlamaConfig(**{name: getattr(peer, name) for name in names})


def _measure(
    runs: dict[str, Callable[[], Any]], batch: int, tokens: int, repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            made = run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first of each warms up
                seconds[name].append(time.perf_counter() - begin)
            assert made.shape[0] == batch
    rows = []
    for name, values in seconds.items():
        rates = [batch * tokens / value for value in values]
        ratios = {peer: [there / here for here, there in zip(values, seconds[peer], strict=True)] for peer in PEERS}
        rows.append(
            {
                "batch": batch,
                "model": name,
                "tokens_per_second": spread(rates),
                "times": {peer: spread(ratio) for peer, ratio in ratios.items()},
            }
        )
    return rows


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _table(result: dict[str, Any]) -> str:
    parameters = ", ".join(f"{name} {count:,}" for name, count in result["parameters"].items())
    lines = [result["machine"], result["model"], f"parameters: {parameters}", ""]
    heads = "".join(f"  {f'times {peer}':>18}" for peer in PEERS)
    lines.append(f"{'batch':>5}  {'model':21} {'tokens/s':>24}{heads}  evaluations of the head a block")
    for row in result["rows"]:
        cells = [(row["tokens_per_second"], 1, 24), *((row["times"][peer], 2, 18) for peer in PEERS)]
        texts = [(f"{v['median']:.{d}f} ({v['min']:.{d}f}-{v['max']:.{d}f})", width) for v, d, width in cells]
        first, *rest = (f"{text:>{width}}" for text, width in texts)
        often = "" if row["evaluations"] is None else f"  {row['evaluations']:.1f}"
        lines.append(f"{row['batch']:>5}  {row['model']:21} {first}" + "".join(f"  {text}" for text in rest) + often)
    return "\n".join(lines)
