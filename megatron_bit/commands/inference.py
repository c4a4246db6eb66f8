"""The commands around a trained model. Each imports what it needs when it is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_bit.commands.arguments import Args, Location, bitlm_configuration, split
from megatron_bit.errors import UserError


def generate(
    run: Annotated[Path, tyro.conf.Positional],
    prompt: tuple[str, ...] = (),
    prompt_file: Path | None = None,
    max_tokens: int = 128,
    steps: int | None = None,
    sampler: str | None = None,
    temperature: float | None = None,
    guidance: float | None = None,
    overlap: float | None = None,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    batch_size: int = 1,
    stream: bool = False,
    weights: Literal["trained", "ema"] = "trained",
    data: Location | None = None,
    compile: bool = False,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Generate text from the newest checkpoint of a run, or from a converted folder, in one process.

    Prompt number i with one seed has one text, whatever the batch. A model of raw records (model.code=raw) makes
    records, and shows each as a line of hexadecimal digits.

    Args:
        run: run folder, checkpoint folder, or what `convert` has made.
        prompt: one or more texts to continue; without any, a text from its beginning. Of records: hexadecimal digits.
        prompt_file: texts to continue, one a line, after those of --prompt. Of records: a file of them, one prompt.
        max_tokens: most tokens to produce for a prompt.
        steps: denoising steps a block, of a diffusion head, default generate.steps of the run; with --overlap
            evaluations of the head a block, default as many as it has groups of bits.
        sampler: how a diffusion head removes the noise: ode, heun, dpm, em, churn; default generate.sampler.
        temperature: of a chain head; default generate.temperature, and 0 takes the likeliest.
        guidance: how far to go from the head's answer without the backbone to that with it; 1 is all the way, and above
            1 further, at twice the head's work; default generate.guidance. The run needs diffusion.condition_drop.
        overlap: of a chain trained with diffusion.noisy_every: draw along a front of noise over so many groups of bits
            (1 or above; inf: all of a block together); default: one after the other.
        seed: the same seed gives the same text.
        stop: a text ends when one of these strings has appeared in it.
        batch_size: prompts generated together.
        stream: print the text as it is made, one prompt at a time.
        weights: the newest ones (default), or their running average if the run kept one (optim.ema_decay).
        data: the run's data folder, if it has moved.
        compile: run the model through torch.compile, which takes a minute or two at first: for many or long texts.
        out: new file for the records of all prompts, as bytes, instead of lines.
        json: print JSON lines.
    """
    for option, value, least in (
        ("--steps", 2 if steps is None else steps, 2 if overlap is None else 1),
        ("--max-tokens", max_tokens, 1),
        ("--batch-size", batch_size, 1),
    ):
        if value < least:
            raise UserError(f"{option} {value} has to be at least {least}")
    if stream and (json or batch_size > 1):
        raise UserError("--stream prints one text at a time: leave out --json and --batch-size")
    if "" in stop:
        raise UserError("--stop '' is an empty string; give the text to stop at")
    for option, texts in (("--prompt", prompt), ("--stop", stop)):
        for text in texts:
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise UserError(f"{option} {text.encode(errors='surrogateescape')!r} is not UTF-8; give text that is")
    file = None if prompt_file is None else (prompt_file, _content(prompt_file))
    from megatron_bit.inference import generate as job

    if temperature is not None and not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature {temperature} has to be 0 (the likeliest) or above")
    if guidance is not None and not 0 <= guidance < float("inf"):
        raise UserError(f"--guidance {guidance} has to be 0 (without the backbone) or above; 1 is no guidance")
    if sampler is not None and sampler not in job.SAMPLERS:
        raise UserError(f"--sampler {sampler} does not exist; choose one of {', '.join(job.SAMPLERS)}")
    if overlap is not None and not overlap >= 1:
        raise UserError(f"--overlap {overlap} has to be 1 or above, or inf")
    how = {"steps": steps, "sampler": sampler, "temperature": temperature, "guidance": guidance, "overlap": overlap}
    results = job.main(
        run,
        prompt,
        max_tokens,
        file=file,
        out=out,
        seed=seed,
        data=data,
        batch_size=batch_size,
        stop=stop,
        show=stream,
        weights=weights,
        compiled=compile,
        how={key: value for key, value in how.items() if value is not None},
    )
    for result in results:
        if json:
            from json import dumps

            print(dumps(result), flush=True)
            continue
        line = (
            f"--- step {result['step']}, {result['tokens']} tokens in {result['seconds']} s, "
            f"{result['tokens_per_second']} tokens/s, first block after {result['seconds_to_first_block']} s"
        )
        if out is not None:
            print(f"{line}, in {out}", flush=True)
            continue
        bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
        print(line if stream else f"{line}\n{result['prompt']}{bold}{result['text']}{plain}", flush=True)
    return 0


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--prompt-file {path} cannot be read: {error}; give a text file, one prompt a line") from None


def convert(
    run: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    args: Annotated[Args, tyro.conf.arg(metavar="[CONFIG.yaml] [key=value ...]")] = (),
    *,
    from_: Annotated[Literal["run", "hf"], tyro.conf.arg(name="from")] = "run",
    to: Literal["hf", "run"] = "hf",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    shard_size: str | None = None,
    weights: Literal["trained", "ema"] | None = None,
    data: Location | None = None,
) -> int:
    """Convert a checkpoint to a Hugging Face folder, or with --from hf --to run such a folder to a run to train on.

    The folder has weights, tokenizer and the code that runs them in transformers. The run has a checkpoint of step 0,
    which `train` continues at any layout.

    Args:
        run: run folder (its newest checkpoint) or checkpoint folder; with --from hf the Hugging Face folder.
        out: folder to make; it may not have anything in it.
        args: with --to run: a YAML file and key=value pairs, such as data.path=DIR; the model's are in the folder.
        from_: what is converted: a run, or a Hugging Face folder (hf).
        to: what is made of it.
        dtype: of the weights; default float32.
        shard_size: above it the weights are several files, such as 500MiB; default 5GB.
        weights: the newest ones (default), or their running average if the run kept one (optim.ema_decay).
        data: the run's data folder, if it has moved.
    """
    if from_ == to:
        raise UserError(f"--from {from_} --to {to} converts nothing; write --to hf, or --from hf --to run")
    if to == "run":
        options = {"--dtype": dtype, "--shard-size": shard_size, "--weights": weights, "--data": data}
        for option, value in options.items():
            if value is not None:
                instead = "; say data.path=DIR" if option == "--data" else ""
                raise UserError(f"{option} {value} is for --to hf{instead}")
        from megatron_bit.inference.from_hf import to_run

        target, overrides = split(args)
        to_run(run, out, target, overrides)
        return 0
    if args:
        raise UserError(f"{args[0]!r} is a key of a run to make (--from hf --to run), and this makes a folder")
    from megatron_bit.inference.convert import to_hf

    to_hf(run, out, dtype=dtype or "float32", shard_size=shard_size or "5GB", data=data, weights=weights or "trained")
    return 0


def serve(
    run: Annotated[Path, tyro.conf.Positional],
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    concurrency: int = 1,
    waiting: int = 32,
    max_tokens: int = 2048,
    data: Location | None = None,
    allow_host: tuple[str, ...] = (),
) -> int:
    """Serve a model over HTTP: OpenAI's /v1/completions with streaming, /v1/models, /health, /metrics.

    With MEGATRON_BIT_API_KEY in the environment, requests have to carry it as a bearer token.

    Args:
        run: run folder, checkpoint folder or converted folder.
        host: address to listen on; anything but a loopback address opens the server to others.
        port: port to listen on.
        name: of the model, in requests; default the folder's name.
        concurrency: requests that run at the same time.
        waiting: requests that may wait; one more is answered with 429.
        max_tokens: most tokens that a request may ask for.
        data: the run's data folder, if it has moved.
        allow_host: names that requests may be for, as Host or from pages as Origin, beside localhost and its addresses.
            Without any, a server on a loopback address answers those alone, and one on another address every Host.
    """
    try:
        from megatron_bit.inference import serve as job
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}: pip install 'megatron-bit[serve]'") from None
    if not (1 <= port <= 65535 and concurrency >= 1 and waiting >= 0 and max_tokens >= 1):
        raise UserError(
            f"--port {port} has to be 1 to 65535, --concurrency {concurrency} and --max-tokens {max_tokens} at "
            f"least 1, --waiting {waiting} at least 0"
        )
    named = run.resolve().name if name is None else name
    return job.main(run, host, port, named, concurrency, waiting, max_tokens, data, allow_host)


def bench_generate(
    args: Annotated[Args, tyro.conf.arg(metavar="[CONFIG.yaml] [key=value ...]")] = (),
    preset: str = "laptop",
    vocab_size: int = 4096,
    batch: tuple[int, ...] = (1, 8, 64),
    steps: tuple[int, ...] = (),
    ahead: tuple[int, ...] = (0,),
    run: Path | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    compile: bool = False,
    tokens: int = 64,
    prompt: int = 32,
    repeats: int = 5,
    json: bool = False,
) -> int:
    """Time generation against softmax models of the same backbone, in turn. All are untrained, but for --run.

    Args:
        args: a YAML file and key=value pairs.
        preset: the model to time.
        vocab_size: of all models.
        batch: batch sizes.
        steps: denoising steps a block to try, of a diffusion head; default 8 16 32.
        ahead: of a chain head: tokens whose groups are guessed and checked at once, to try; 0 is one after another.
        run: a run whose BitLM is timed, instead of an untrained one of the preset; what a guess is worth needs it.
        dtype: of all models; default that of `generate`, in which the run computes (train.precision).
        compile: all models through torch.compile, the softmax ones with a cache of fixed length; minutes more.
        tokens: new tokens of each text.
        prompt: tokens of each prompt.
        repeats: timed runs of each, in turn.
        json: print JSON.
    """
    from megatron_bit.bench import generate as job

    if min(*batch, *steps, tokens, prompt, repeats) < 1 or 1 in steps:
        raise UserError("bench generate: --steps are at least 2, all other numbers at least 1")
    config = bitlm_configuration(args, preset)
    if min(ahead) < 0 or (any(ahead) and run is None):
        raise UserError(
            f"--ahead {max(ahead, key=abs)}: give 0 or above, and a trained run (--run RUN), because how often guesses "
            "are right depends on the weights"
        )
    if steps and config.model.head.kind == "chain":
        raise UserError("--steps mean nothing to a chain head; leave them out, or add model.head.kind=diffusion")
    return job.main(
        config, vocab_size=vocab_size, batches=batch, steps=steps or (8, 16, 32), ahead=ahead, run=run, dtype=dtype,
        compiled=compile, tokens=tokens, prompt=prompt, repeats=repeats, as_json=json,
    )  # fmt: skip
