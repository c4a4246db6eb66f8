"""`megatron-bit evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_bit.commands.arguments import Location
from megatron_bit.errors import UserError


def evaluate(
    model: Annotated[Path, tyro.conf.Positional],
    likelihood: bool = True,
    data: Location | None = None,
    samples: int | None = None,
    noise_samples: int | None = None,
    tolerance: float | None = None,
    max_passes: int | None = None,
    texts: int = 0,
    tokens: int | None = None,
    prefix: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    temperature: float | None = None,
    guidance: float | None = None,
    overlap: float | None = None,
    scorer: Path | None = None,
    mauve_model: Path | None = None,
    tasks: tuple[str, ...] = (),
    tasks_data: Path | None = None,
    limit: int | None = None,
    weights: Literal["trained", "ema"] = "trained",
    seed: int = 0,
    batch_size: int = 8,
    json: bool = False,
    out: Path | None = None,
) -> int:
    """Measure a model: likelihood of validation text, quality of generated text, zero-shot tasks.

    In one process on one device; nothing is downloaded. See docs/evaluation.md.

    Args:
        model: run folder, checkpoint folder, what `convert` has made, or a causal model of transformers.
        likelihood: of the validation split, in nats per token with its standard error, and bits per byte.
        data: data folder with the validation text; default the run's.
        samples: validation samples to score, at most, each of the length that the model was trained on; default 256.
        noise_samples: of a diffusion head: noise levels of a block in one pass; default evaluate.noise_samples of the
            run, or 16.
        tolerance: of a diffusion head: more passes are made until the standard error of the noise, in nats per token,
            is at most this; default 0.01.
        max_passes: of a diffusion head: but no more than these; default 16.
        texts: texts to generate and to have scored by --scorer, beside as many real ones; 0 for none.
        tokens: of each generated text; default 128.
        prefix: tokens of validation text that each generated text continues; default 0.
        steps: denoising steps a block, of a diffusion head; with --overlap evaluations a block; default as `generate`.
        sampler: of a diffusion head; default as `generate`.
        temperature: of a chain or softmax head; default 1.
        guidance: of a run with diffusion.condition_drop, as `generate`; default 1, which is none.
        overlap: of a chain trained with diffusion.noisy_every: texts are drawn, and the likelihood is bounded, along a
            front of noise over so many groups of bits (1 or above, or inf); the options about noise hold then.
        scorer: the model that scores generated text, of any kind that can be evaluated.
        mauve_model: folder of a transformers model whose features MAUVE compares; needs the library mauve-text.
        tasks: zero-shot tasks: lambada, hellaswag, piqa, blimp.
        tasks_data: folder with the tasks' files.
        limit: items of each task, evenly spaced; default all.
        weights: of the run: the newest ones (default), or their running average if it kept one (optim.ema_decay).
        seed: of noise and generated text.
        batch_size: rows scored or generated together; results do not depend on it.
        json: print JSON.
        out: file for the report, as JSON.
    """
    for option, value, least in (
        ("--samples", samples, 2), ("--noise-samples", noise_samples, 2), ("--max-passes", max_passes, 2),
        ("--texts", texts, 0), ("--tokens", tokens, 1), ("--prefix", prefix, 0),
        ("--steps", steps, 2 if overlap is None else 1),
        ("--limit", limit, 1), ("--seed", seed, 0), ("--batch-size", batch_size, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            raise UserError(f"{option} {value} has to be at least {least}")
    if seed >= 2**63:
        raise UserError(f"--seed {seed} has to be below 2^63")
    if tolerance is not None and not 0 < tolerance < float("inf"):
        raise UserError(f"--tolerance {tolerance} has to be above 0")
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature {temperature} has to be 0 (the likeliest) or above")
    if guidance is not None and not 0 <= guidance < float("inf"):
        raise UserError(f"--guidance {guidance} has to be 0 (without the backbone) or above; 1 is no guidance")
    if overlap is not None and not overlap >= 1:
        raise UserError(f"--overlap {overlap} has to be 1 or above, or inf")
    how = {"steps": steps, "sampler": sampler, "temperature": temperature, "guidance": guidance}
    _together("--texts", bool(texts), tokens=tokens, prefix=prefix, scorer=scorer, mauve_model=mauve_model, **how)
    _together("--tasks", bool(tasks), tasks_data=tasks_data, limit=limit)
    if not likelihood:
        _together("--likelihood", False, samples=samples, tolerance=tolerance, max_passes=max_passes)
        _together("--likelihood or --tasks", bool(tasks), noise_samples=noise_samples)
    if texts and scorer is None:
        raise UserError("--texts needs a model to score them: --scorer PATH (a run, or a Hugging Face folder)")
    if tasks and tasks_data is None:
        raise UserError("--tasks needs the folder with their files: --tasks-data DIR")
    if not (likelihood or texts or tasks):
        raise UserError("--no-likelihood leaves nothing to do; give --texts N or --tasks NAME")
    folders = {"": model, "--scorer ": scorer, "--mauve-model ": mauve_model, "--tasks-data ": tasks_data}
    for option, folder in folders.items():
        if folder is not None and not folder.is_dir():
            raise UserError(f"{option}{folder} is not a folder")
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        why = "it is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise UserError(f"--out {out} cannot be written: {why}")
    from megatron_bit.evaluation import report
    from megatron_bit.evaluation.task_files import TASKS
    from megatron_bit.inference.generate import SAMPLERS

    for task in tasks:
        if task not in TASKS:
            raise UserError(f"--tasks {task} does not exist; choose of {', '.join(TASKS)}")
    if sampler is not None and sampler not in SAMPLERS:
        raise UserError(f"--sampler {sampler} does not exist; choose one of {', '.join(SAMPLERS)}")
    request = report.Request(
        likelihood=likelihood, samples=samples, tolerance=tolerance, max_passes=max_passes,
        noise_samples=noise_samples, texts=texts, tokens=tokens or 128, prefix=prefix or 0,
        how={name: value for name, value in how.items() if value is not None}, scorer=scorer,
        mauve_model=mauve_model, tasks=tasks, tasks_data=tasks_data, limit=limit, weights=weights, data=data, seed=seed,
        batch_size=batch_size, overlap=overlap,
    )  # fmt: skip
    return report.main(model, request, as_json=json, out=out)


def _together(option: str, given: bool, **others: object) -> None:
    """UserError if one of the others is given without the option that it belongs to."""
    for name, value in others.items():
        if value is not None and not given:
            raise UserError(f"--{name.replace('_', '-')} has no use without {option}")
