"""Generation from a checkpoint of a run, in one process: one backbone pass and `steps` head passes a block."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mbit_data.tokenizer import Tokenizer
from torch import Tensor

from megatron_bit.checkpoint.folder import read_meta
from megatron_bit.checkpoint.load import load_weights
from megatron_bit.config import config_from_dict
from megatron_bit.data.manifest import load_manifest
from megatron_bit.diffusion.sampler import sample_block
from megatron_bit.errors import UserError
from megatron_bit.model.bitlm import BitLM, build_model
from megatron_bit.parallel import groups as process_groups
from megatron_bit.run_folder import newest_checkpoint


class Generator:
    """A model of one process with its tokenizer."""

    def __init__(self, run: Path, data: str | None = None) -> None:
        """
        Args:
            run: a run folder (its newest complete checkpoint) or a checkpoint folder.
            data: folder with the run's tokenizer, if it has moved since.

        Raises:
            UserError: no complete checkpoint, or the tokenizer is gone or another one.
        """
        folder = newest_checkpoint(run)
        meta = read_meta(folder)
        tree: dict[str, Any] = meta["config"]
        tree["parallel"] = {"tp": 1, "pp": 1, "vpp": 1}
        self.config = config_from_dict(tree)
        self.step = int(meta["step"])
        manifest = load_manifest(data or self.config.data.path, check_files=False)
        if manifest.tokenizer_sha256 != meta["identity"]["tokenizer"]:
            raise UserError(
                f"the tokenizer of {manifest.folder} is not the one of {folder}; give the run's data folder"
            )
        self.tokenizer = Tokenizer(manifest.tokenizer_path)
        groups = process_groups.init(self.config)
        self.model: BitLM = build_model(self.config, manifest.vocab_size, groups)[0].eval()
        load_weights(folder, [self.model], groups)
        self.device = groups.device

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        max_tokens: int,
        *,
        steps: int,
        sampler: str = "ode",
        seed: int = 0,
        sequence: int = 0,
    ) -> tuple[str, int]:
        """Continue a prompt; stops at the end-of-document token.

        The prompt is filled up in front with end-of-document tokens to whole blocks. The same (seed, sequence)
        gives the same text.

        Returns:
            the text, and how many tokens were produced (whole blocks, so it may be more than the text shows).
        """
        k, model = self.config.model.block_size, self.model
        ids = self.tokenizer.encode(prompt)
        ids = [self.tokenizer.eos_id] * (-len(ids) % k) + ids
        tokens = torch.tensor([ids], dtype=torch.int64, device=self.device)
        keys = torch.tensor([sequence], dtype=torch.int64, device=self.device)
        produced: list[int] = []
        while len(produced) < max_tokens:
            window = self._window(tokens)
            hidden = model.hidden(torch.cat((window, window.new_zeros(1, k)), dim=1))[-k:]
            assert model.head is not None
            logits = sample_block(
                functools.partial(model.head, hidden=hidden),
                model.noise,
                sampler=sampler,
                steps=steps,
                seed=seed,
                sequence=keys,
                block=tokens.shape[1] // k,
                block_size=k,
                bits=self.config.model.bits,
            )
            block = model.codec.decode(logits).t()
            tokens = torch.cat((tokens, block), dim=1)
            produced.extend(block[0].tolist())
            if self.tokenizer.eos_id in produced:
                break
        return self._text(produced[:max_tokens]), len(produced)

    def _window(self, tokens: Tensor) -> Tensor:
        """The last blocks that fit the length the model was trained at, with room for the next block."""
        k = self.config.model.block_size
        return tokens[:, -(self.config.data.seq_length - k) :] if self.config.data.seq_length > k else tokens[:, :0]

    def _text(self, ids: Sequence[int]) -> str:
        end = ids.index(self.tokenizer.eos_id) if self.tokenizer.eos_id in ids else len(ids)
        return self.tokenizer.decode(list(ids[:end]))


def main(
    run: Path, prompts: Sequence[str], max_tokens: int, steps: int, sampler: str, seed: int, data: str | None
) -> list[dict[str, Any]]:
    """Generate for every prompt; each result has the text, tokens and seconds."""
    generator = Generator(run, data)
    results = []
    for index, prompt in enumerate(prompts):
        begin = time.perf_counter()
        text, count = generator.generate(prompt, max_tokens, steps=steps, sampler=sampler, seed=seed, sequence=index)
        seconds = time.perf_counter() - begin
        results.append(
            {
                "prompt": prompt,
                "text": text,
                "tokens": count,
                "seconds": round(seconds, 3),
                "tokens_per_second": round(count / seconds, 1),
                "step": generator.step,
            }
        )
    process_groups.shutdown()
    return results
