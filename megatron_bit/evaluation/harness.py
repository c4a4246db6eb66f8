"""lm-evaluation-harness with our models in it: `python -m megatron_bit.evaluation.harness --model megatron_bit ...`.

All other arguments are lm_eval's own. It finds models in its own package alone (0.4.13), so this registers ours and
then runs its command line. The nats are those of `megatron-bit evaluate`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from megatron_bit.errors import UserError
from megatron_bit.io.text import shown

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
    from megatron_bit.evaluation import tasks
    from megatron_bit.evaluation.loading import open_model
    from megatron_bit.evaluation.progress import Progress
    from megatron_bit.evaluation.scoring import score
    from megatron_bit.evaluation.task_files import Item
    from megatron_bit.inference.hf.text_bitlm import TextStream

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
            if weights not in ("trained", "ema"):
                raise UserError(f"--model_args weights={weights} is not known; give trained or ema")
            self._batch_size, self._seed = _number("--batch_size", batch_size, 1), _number("seed", seed, 0)
            self._own = open_model(Path(pretrained), data, weights)
            if self._own.record_bits:
                raise UserError(f"{pretrained} is a model of raw records, and tasks are of text")

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """(ln p(continuation | context), whether greedy generation writes it); of a diffusion head minus the bound
            that `evaluate`'s tasks have, and False."""
            items = [Item(context, (text,), 0) for context, text in (request.args for request in requests)]
            costs = tasks.costs("lm_eval", self._own, items, seed=self._seed, batch_size=self._batch_size)
            hits = tasks.written("lm_eval", self._own, items, batch_size=self._batch_size)
            return [(-cost, bool(hits and hits[i])) for i, (cost,) in enumerate(costs)]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            """ln p of whole texts, in windows where they are longer than the context."""
            rows = [self._own.encode(text) for (text,) in (request.args for request in requests)]
            progress = Progress("lm_eval")
            nats = score(self._own, rows, seed=self._seed, batch_size=self._batch_size, progress=progress)
            return [-row.double().sum().item() for row in nats]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """Text up to the first of `until`, or an end of the document; greedy unless do_sample says otherwise."""
            return [self._until(i, *request.args) for i, request in enumerate(requests)]

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
            stream = TextStream(self._own.decoder, ids, stops)
            return stream.add(*made) + stream.flush()

    return Harness


def _number(name: str, value: int | str, least: int) -> int:
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise UserError(f"{name} {value} has to be a whole number of at least {least}")
    return number


def main() -> None:
    """lm_eval's command line, with ours among its models."""
    import sys

    try:
        registered()
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

        cli_evaluate()
    except UserError as error:
        print(f"megatron-bit: error: {shown(error)}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
