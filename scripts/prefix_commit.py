#!/usr/bin/env python3
"""What is gained by keeping only the confident prefix of a block that a diffusion head has drawn.

    python scripts/prefix_commit.py RUN --judge AR_RUN

Draws blocks of K tokens, keeps the first token and those behind it that are likely enough, and draws the next block
from there on. A token's confidence is the probability that the head gives it on seeing nothing but noise, that is from
the backbone's states alone. A block may then begin anywhere: a causal backbone knows positions relative to each other
only. Tokens a block, nats of the new text under the judge (a run with the same tokenizer), distinct pairs of tokens;
beside them real text. Nothing of this is an option of `generate`: docs/inference.md says why.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bit.errors import UserError
from megatron_bit.evaluation.loading import open_model
from megatron_bit.evaluation.models import Model
from megatron_bit.evaluation.progress import Progress
from megatron_bit.evaluation.samples import distinct, ratio
from megatron_bit.evaluation.scoring import score
from megatron_bit.evaluation.validation import Validation
from megatron_bit.inference.generate import Generator
from megatron_bit.inference.hf import noise_bitlm as hf_noise
from megatron_bit.inference.hf import settings_bitlm as hf_settings


@torch.no_grad()
def generate(model: Any, prompts: Tensor, tokens: int, steps: int, least: float, seed: int) -> tuple[Tensor, float]:
    """Continue prompts int64 [b, S] by `tokens` tokens; also the mean number of tokens kept of a block.

    least: confidence that every token of a block behind its first has to have; 0 keeps all, above 1 only the first.
    """
    k, rows = model.config.block_size, len(prompts)
    end = prompts.shape[1] + tokens
    ids = torch.nn.functional.pad(prompts, (0, tokens + k))
    length, sequence = torch.full((rows,), prompts.shape[1]), torch.arange(rows)
    settings = hf_settings.Settings.read(
        None, {"steps": steps, "seed": seed, "max_new_tokens": tokens}, 0, None, "diffusion", False
    )
    blocks = 0
    while (short := length < end).any():
        position = torch.arange(ids.shape[1])
        states = model.model(torch.nn.functional.pad(ids[:, :-k], (k, 0)), position.expand(rows, -1))
        where = (length[:, None] + torch.arange(k)).clamp(max=ids.shape[1] - 1)
        hidden = states.gather(1, where[..., None].expand(-1, -1, states.shape[-1]))
        drawn = model._denoise(hidden, settings, sequence, length)
        sure = confidence(model, hidden, drawn, seed, sequence, length) >= least
        sure[:, 0] = True
        kept = sure.int().cumprod(1).sum(1)
        kept = torch.where(short, torch.minimum(kept, end - length), 0)
        blocks += int(short.sum())
        for i in range(k):
            take = (i < kept).nonzero().squeeze(1)
            ids[take, length[take] + i] = drawn[take, i]
        length = length + kept
    return ids[:, prompts.shape[1] : end], rows * tokens / blocks


def confidence(model: Any, hidden: Tensor, drawn: Tensor, seed: int, sequence: Tensor, block: Tensor) -> Tensor:
    """Probability of the tokens drawn int64 [b, K], given the states and pure noise."""
    config = model.config
    level = torch.full((len(hidden), 1, 1), math.log(config.sigma_max))
    sigma = level.exp()[..., None, None]
    noise = hf_noise.gaussian(seed, hf_noise.SAMPLING, sequence, block[:, None], 1, config.block_size, config.bits, 0)
    logits = model.posterior.logits(model.head(sigma * noise, level, hidden[:, None]), sigma * noise, sigma)
    scores = model.posterior.token_scores(logits[:, 0, 0], model.model.code_table).softmax(-1)
    return scores.gather(-1, drawn[..., None]).squeeze(-1)


def row(name: str, kept: str, judge: Model, prompts: Sequence[Sequence[int]], made: Sequence[Sequence[int]]) -> str:
    texts = [[*prompt, *new] for prompt, new in zip(prompts, made, strict=True)]
    nats = score(judge, texts, seed=0, batch_size=32, progress=Progress("judging"))
    sums = [n[len(prompt) :].double().sum().item() for n, prompt in zip(nats, prompts, strict=True)]
    mean, error = ratio(sums, [len(new) for new in made])
    return f"| {name} | {kept} | {mean:.3f} | {error:.3f} | {distinct(made, 2):.3f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, nargs="+", default=[0.0, 0.01, 0.03, 0.1, 0.3, 1.1])
    given = parser.parse_args()
    generator, judge = Generator(given.run), open_model(given.judge)
    model: Any = generator.model
    config = model.config
    if config.head_kind != "diffusion" or config.block_causal or not config.vocab_size:
        raise UserError(f"{given.run} is no diffusion head over a causal backbone; this measures nothing of others")
    own = open_model(given.run)
    if own.tokenizer_sha256 != judge.tokenizer_sha256 or own.training is None:
        raise UserError(f"--judge {given.judge} has another tokenizer than {given.run}")
    pieces = Validation(own, own.training.data.folders[0]).spread(given.texts, given.prompt + given.tokens)
    prompts = [piece[: given.prompt] for piece in pieces]
    print("| confidence at least | tokens kept of a block | judge's nats/token | +- s.e. | distinct pairs |")
    print("|---|---|---|---|---|")
    for least in given.least:
        made, kept = generate(model, torch.tensor(prompts), given.tokens, given.steps, least, given.seed)
        name = "all are kept" if least <= 0 else "the first alone" if least > 1 else f"{least:g}"
        print(row(name, f"{kept:.2f}", judge, prompts, made.tolist()), flush=True)
    print(row("real text", "", judge, prompts, [piece[given.prompt :] for piece in pieces]))
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        raise SystemExit(f"prefix_commit.py: error: {error}") from None
