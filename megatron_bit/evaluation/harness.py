"""lm-evaluation-harness with our models in it: `python -m megatron_bit.evaluation.harness --model megatron_bit ...`.

All other arguments are lm_eval's own. It finds models in its own package alone (0.4.13), so this registers ours and
then runs its command line. The nats are those of `megatron-bit evaluate`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_bit.errors import UserError

NAME = "megatron_bit"
NEW_TOKENS = 256  # of a text whose task does not say


@functools.cache
def registered() -> Any:
    """The class under its name in lm_eval; UserError if that is not installed."""
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
        from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise UserError("lm_eval is not installed: pip install 'megatron-bit[eval]'") from None
    from megatron_bit.evaluation.loading import open_model
    from megatron_bit.evaluation.progress import Progress
    from megatron_bit.evaluation.scoring import encode_behind, score

    @register_model(NAME)
    class Harness(LM):
        """A run, a checkpoint, a converted folder, or a causal model of transformers."""

        def __init__(
            self,
            pretrained: str,
            data: str | None = None,
            weights: Any = "trained",
            batch_size: int | str = 8,
            seed: int = 0,
            **unused: Any,
        ) -> None:
            """
            Args:
                pretrained: the folder.
                data: data folder with the run's tokenizer, if it is not where the run had it.
                weights: of a run: trained or ema.
                batch_size: texts at a time.
                unused: device and max_batch_size, which lm_eval always sends: a model is on the GPU if there is one.
            """
            super().__init__()
            unknown = sorted(unused.keys() - {"device", "max_batch_size"})
            if unknown:
                raise UserError(f"--model_args {unknown[0]} is not known; give pretrained, data, weights or seed")
            if str(batch_size).startswith("auto"):
                raise UserError(f"--batch_size {batch_size} is not known; give a number")
            self._own = open_model(Path(pretrained), data, weights)
            if self._own.record_bits:
                raise UserError(f"{pretrained} is a model of raw records, and tasks are of text")
            self._batch_size, self._seed = int(batch_size), int(seed)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """(ln p(continuation | context), whether greedy generation writes it); of a diffusion head minus the bound
            that `evaluate`'s tasks have, and False."""
            pairs = []
            for context, text in (request.args for request in requests):
                ids, count = encode_behind(self._own, context, text)
                pairs.append((ids[: len(ids) - count], ids[len(ids) - count :]))
            nats = self._nats([[*context, *target] for context, target in pairs])
            out = []
            for start in range(0, len(pairs), self._batch_size):
                some = pairs[start : start + self._batch_size]
                hits = self._own.greedy([context for context, _ in some], [target for _, target in some])
                for i, (_, target) in enumerate(some):
                    row = nats[start + i]
                    cost = row[len(row) - len(target) :].double().sum().item()
                    out.append((-cost, bool(hits and hits[i])))
            return out

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            """ln p of whole texts, in windows where they are longer than the context."""
            rows = [self._own.encode(text) for (text,) in (request.args for request in requests)]
            return [-row.double().sum().item() for row in self._nats(rows)]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """Text up to the first of `until`, or an end of the document; greedy unless do_sample says otherwise."""
            return [self._until(i, *request.args) for i, request in enumerate(requests)]

        def _nats(self, rows: Sequence[Sequence[int]]) -> list[Any]:
            progress = Progress("lm_eval")
            return score(self._own, rows, seed=self._seed, batch_size=self._batch_size, progress=progress)

        def _until(self, number: int, context: str, asked: dict[str, Any]) -> str:
            stops = asked.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            most = int(asked.get("max_gen_toks") or asked.get("max_new_tokens") or NEW_TOKENS)
            how: dict[str, Any] = {}
            if self._own.head != "diffusion":
                how["temperature"] = float(asked.get("temperature") or 1.0) if asked.get("do_sample") else 0.0
            room = self._own.context - most
            ids = self._own.encode(context)
            ids = ids if self._own.head != "softmax" else ids[-max(1, room) :]
            (made,) = self._own.generate([ids], most, [number], self._seed, how)
            if self._own.eos_id in made:
                made = made[: made.index(self._own.eos_id)]
            whole, before = self._own.decode([*ids, *made]), self._own.decode(ids)
            text = whole[len(before) :]
            return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]

    return Harness


def main() -> None:
    """lm_eval's command line, with ours among its models."""
    import sys

    from megatron_bit.errors import EXIT_USER_ERROR

    try:
        registered()
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

        cli_evaluate()
    except UserError as error:
        print(f"megatron-bit: error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None


if __name__ == "__main__":
    main()
