"""`megatron-bit evaluate`: run what was asked for, and show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_bit.errors import UserError
from megatron_bit.evaluation import likelihood, samples, task_files, tasks
from megatron_bit.evaluation.likelihood import Likelihood
from megatron_bit.evaluation.loading import open_model
from megatron_bit.evaluation.models import Model
from megatron_bit.evaluation.samples import Samples, Statistics
from megatron_bit.evaluation.tasks import LastWord, Ranking
from megatron_bit.evaluation.validation import Validation
from megatron_bit.inference.hf_names import WeightsOf
from megatron_bit.io.files import write_atomic
from megatron_bit.io.measured import json_of, show
from megatron_bit.run.folder import data_of


@dataclass(frozen=True)
class Request:
    """What to evaluate; the command's options (`commands/evaluation.py`) say what each of them means."""

    likelihood: bool
    samples: int | None
    tolerance: float | None
    max_passes: int | None
    noise_samples: int | None
    texts: int
    tokens: int
    prefix: int
    how: Mapping[str, Any]
    scorer: Path | None
    mauve_model: Path | None
    tasks: Sequence[str]
    tasks_data: Path | None
    limit: int | None
    weights: WeightsOf
    data: str | None
    seed: int
    batch_size: int
    overlap: float | None = None


@dataclass(frozen=True)
class Report:
    """Everything that was measured; what was not asked for is None or empty."""

    model: str
    head: str
    block_size: int
    step: int | None
    weights: str  # of a run: trained, or their average
    seed: int
    likelihood: Likelihood | None
    samples: Samples | None
    tasks: tuple[Ranking | LastWord, ...]
    skipped: str = ""  # what was asked for and does not go with this model


def main(path: Path, request: Request, *, as_json: bool, out: Path | None) -> int:
    """Evaluate, print the table or JSON, and write the JSON to `out`."""
    report = evaluate(path, request)
    text = json_of(asdict(report), indent=1)
    if out is not None:
        try:
            write_atomic(out, f"{text}\n".encode())
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from None
    print(text if as_json else render(report), flush=True)
    return 0


def evaluate(path: Path, request: Request) -> Report:
    """Everything that can be refused without a measurement is refused before the first one.

    Raises:
        UserError: something cannot be opened, or an option means nothing to this model.
    """
    items = {}
    for task in request.tasks:
        assert request.tasks_data is not None
        items[task] = task_files.thin(task_files.read(task, request.tasks_data), request.limit)
    model = open_model(path, request.data, request.weights)
    skipped = ""
    if model.record_bits:
        request, items, skipped = _without_text(model, request)
    how = {**request.how, **({} if request.overlap is None else {"overlap": request.overlap})}
    model.check(how)
    model.overlap = request.overlap or 0.0
    _set_noise(model, request)
    scorer = open_model(request.scorer, request.data) if request.scorer is not None else None
    validation = Validation(model, _data(model, request)) if request.likelihood or request.texts else None
    if request.data is not None and validation is None and model.training is None:
        raise UserError(f"--data {request.data} has no use here: {model.path} has its own tokenizer")
    common: dict[str, Any] = {"seed": request.seed, "batch_size": request.batch_size}
    found, made = None, None
    if request.likelihood:
        assert validation is not None
        found = likelihood.measure(
            model, validation, samples=request.samples or likelihood.SAMPLES,
            tolerance=request.tolerance or likelihood.TOLERANCE,
            max_passes=request.max_passes or likelihood.MAX_PASSES, **common,
        )  # fmt: skip
    if request.texts:
        assert validation is not None and scorer is not None
        made = samples.measure(
            model, scorer, validation, texts=request.texts, tokens=request.tokens, prefix=request.prefix,
            how=how, featurizer=request.mauve_model, **common,
        )  # fmt: skip
    results = [
        (tasks.last_word if task == "lambada" else tasks.rank)(task, model, some, **common)
        for task, some in items.items()
    ]
    return Report(
        str(path), model.head, model.block_size, model.step, request.weights, request.seed, found, made,
        tuple(results), skipped,
    )  # fmt: skip


def _without_text(model: Model, request: Request) -> tuple[Request, dict[str, Any], str]:
    """The same without what is of text: no tasks, and a line that says so. UserError if nothing is left."""
    parts = ["--texts"] * bool(request.texts) + ["--tasks"] * bool(request.tasks)
    if not request.likelihood:
        raise UserError(f"{' and '.join(parts)} are about text, and {model.path} is a model of raw records")
    said = f"skipped, because its tokens are raw records and no text: {', '.join(parts)}" if parts else ""
    return replace(request, texts=0, tasks=(), how={}, scorer=None), {}, said


def _set_noise(model: Model, request: Request) -> None:
    for name in ("tolerance", "max_passes", "noise_samples"):
        if getattr(request, name) is not None and model.exact:
            raise UserError(
                f"--{name.replace('_', '-')} is about noise, and the likelihood of a {model.head} head has none; leave "
                "it out"
            )
    if request.noise_samples is not None:
        model.noise_samples = request.noise_samples


def _data(model: Model, request: Request) -> str:
    if request.data is not None:
        return request.data
    if model.training is None:
        raise UserError(f"{model.path} does not say where validation text is: give --data DIR, or --no-likelihood")
    return data_of(model.training, f"checkpoint of {model.path}")


def render(report: Report) -> str:
    """The report as lines for people."""
    step = "" if report.step is None else f", step {report.step}"
    blocks = "" if report.head == "softmax" else f", blocks of {report.block_size}"
    average = "" if report.weights == "trained" else f", weights: {report.weights}"
    lines = [f"{report.model}: {report.head} head{blocks}{step}{average}"]
    if report.likelihood is not None:
        lines += ["", *_likelihood(report.likelihood)]
    if report.samples is not None:
        lines += ["", *_samples(report.samples)]
    if report.skipped:
        lines += ["", report.skipped]
    if report.tasks:
        lines += ["", *_tasks(report.tasks)]
    return "\n".join(lines)


def _likelihood(it: Likelihood) -> list[str]:
    noise = (
        "exact"
        if it.exact
        else f"an upper bound; text +- {it.text_standard_error:.4f}, noise +- {it.noise_standard_error:.4f} after "
        f"{it.passes} passes of {it.noise_samples} noise levels"
    )
    if it.bits_per_byte is None or it.perplexity is None:
        return [
            f"validation ({it.samples} samples, {it.tokens:,} records)",
            f"  nats/record  {show(it.nats_per_token, 4)} +- {show(it.standard_error, 4)}  ({noise})",
            f"  bits/record  {show(it.bits_per_record or 0.0, 4)}",
        ]
    return [
        f"validation ({it.samples} samples, {it.tokens:,} tokens, {it.bytes:,} bytes)",
        f"  nats/token   {show(it.nats_per_token, 4)} +- {show(it.standard_error, 4)}  ({noise})",
        f"  bits/byte    {show(it.bits_per_byte, 4)}",
        f"  perplexity   {show(it.perplexity)}",
    ]


def _samples(it: Samples) -> list[str]:
    how = "".join(f", {name} {value}" for name, value in it.how.items())
    behind = f" behind {it.prefix} of validation text" if it.prefix else ""
    bound = "; its nats are an upper bound" if it.scorer_head == "diffusion" else ""
    rows: list[tuple[str, Callable[[Statistics], str]]] = [
        ("nats/token", lambda s: show(s.nats_per_token, 4)),
        ("  +-", lambda s: show(s.standard_error, 4)),
        ("perplexity", lambda s: show(s.perplexity)),
        ("nats/byte", lambda s: show(s.nats_per_byte, 4)),
        ("unigram entropy", lambda s: show(s.unigram_entropy, 4)),
        *((f"distinct-{n}", lambda s, n=n: show(s.distinct[n - 1], 4)) for n in (1, 2, 3)),
        ("scored tokens", lambda s: f"{s.tokens:,}"),
        ("bytes", lambda s: f"{s.bytes:,}"),
    ]

    mauve = f"{it.mauve:.4f}" if it.mauve is not None else f"not computed: {it.mauve_not_computed}"
    return [
        f"{it.texts} texts of {it.tokens} tokens{behind}{how}; scored by {it.scorer} ({it.scorer_head} head{bound})",
        f"  {'':16}{'generated':>12}{'real':>12}",
        *(f"  {name:16}{value(it.generated):>12}{value(it.real):>12}" for name, value in rows),
        f"  MAUVE           {mauve}",
        f"  the first begins: {' '.join(it.first.split())[:200]}",
    ]


def _tasks(results: Sequence[Ranking | LastWord]) -> list[str]:
    lines = [f"{'task':10}{'items':>7}  {'accuracy':>17}{'per byte':>18}{'chance':>9}"]
    words = []
    for it in results:
        if isinstance(it, Ranking):
            lines.append(
                f"{it.task:10}{it.items:>7}  {_share(it.accuracy, it.standard_error):>17}"
                f"{_share(it.accuracy_per_byte, it.standard_error_per_byte):>18}{it.chance:>9.3f}"
            )
        else:
            hits = (
                f"greedy {_share(it.accuracy, it.accuracy_standard_error)}"
                if it.accuracy is not None and it.accuracy_standard_error is not None
                else f"accuracy not computed: {it.accuracy_not_computed}"
            )
            words.append(
                f"{it.task}: {it.items} last words, "
                f"{show(it.nats_per_word, 3)} +- {show(it.standard_error, 3)} nats each "
                f"(perplexity {it.perplexity:.4g}); {hits}"
            )
    return (lines if len(lines) > 1 else []) + words


def _share(mean: float, error: float) -> str:
    return f"{mean:.3f} +- {error:.3f}"
