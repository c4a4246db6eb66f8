"""`megatron-bit evaluate` on real runs of every head, and on folders of transformers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from gloo_ranks import run_ranks
from safetensors.torch import load_file, save_file

from megatron_bit import cli
from megatron_bit.evaluation.causal import _draw
from megatron_bit.evaluation.loading import open_model
from megatron_bit.evaluation.report import Report, Request, evaluate, render
from megatron_bit.inference.convert import to_hf

VOCAB_SIZE, SAMPLES = 421, 12
HEADS: dict[str, dict[str, Any]] = {
    "bits": {},
    "groups": {
        "model.group_bits": 5,
        "diffusion.noise": "entropy_rate",
        "diffusion.condition_drop": 0.2,
        "diffusion.self_condition": 0.5,
    },
    "chain": {"model.head.kind": "chain", "model.group_bits": 5},
    "softmax": {"model.head.kind": "softmax", "model.block_size": 1},
}
NOTHING = Request(
    likelihood=False, samples=None, tolerance=None, max_passes=None, noise_samples=None, texts=0, tokens=12, prefix=0,
    how={}, scorer=None, mauve_model=None, tasks=(), tasks_data=None, limit=None, weights="trained", data=None,
    seed=0, batch_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of one step of every head, with a validation at its end."""
    root = tmp_path_factory.mktemp("evaluated")
    for name, settings in HEADS.items():
        more = {
            "train.steps": 1, "model.num_layers": 2, "evaluate.every": 1, "evaluate.samples": SAMPLES,
            "evaluate.noise_samples": 3, "evaluate.initial": False, "train.micro_batch_size": 4,
            "optim.ema_decay": 0.5 if name in ("chain", "softmax") else 0.0,
        }  # fmt: skip
        overrides = tiny_runs.overrides(root / name, tiny_data, {**more, **settings})
        assert run_ranks(tiny_runs.train, 1, overrides) == [0]
    return {name: root / name for name in HEADS}


@pytest.fixture(scope="module")
def folders(runs: dict[str, Path]) -> dict[str, Path]:
    """Converted runs, and a softmax whose probabilities are all the same."""
    out = {}
    for name in ("groups", "chain", "softmax"):
        out[name] = runs[name].with_name(f"{name}-hf")
        to_hf(runs[name], out[name])
    out["uniform"] = out["softmax"].with_name("uniform")
    shutil.copytree(out["softmax"], out["uniform"])
    file = out["uniform"] / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = torch.zeros_like(weights["lm_head.weight"])
    save_file(weights, file, {"format": "pt"})
    return out


@pytest.mark.parametrize("name", HEADS)
def test_the_first_pass_is_the_trainers_validation(name: str, runs: dict[str, Path]) -> None:
    last = json.loads((runs[name] / "validation.jsonl").read_text().splitlines()[-1])
    request = replace(NOTHING, likelihood=True, samples=SAMPLES)
    exact = name in ("chain", "softmax")
    if exact:
        found = evaluate(runs[name], request).likelihood
        assert found is not None and found.exact
        assert found.nats_per_token == pytest.approx(last["nats_per_token_bound"], abs=1e-4)
        assert found.standard_error == pytest.approx(last["standard_error"], abs=1e-5)
        assert found.samples == last["samples"]
        average = evaluate(runs[name], replace(request, weights="ema"))
        assert average.likelihood is not None and "weights: ema" in render(average)
        assert 1e-3 < abs(average.likelihood.nats_per_token - found.nats_per_token) < 1
        return
    one = _first_pass(runs[name], request)
    assert one == pytest.approx(last["nats_per_token_bound"], abs=1e-4)
    found = evaluate(runs[name], replace(request, tolerance=1e-6, max_passes=4)).likelihood
    assert found is not None and (found.passes, found.noise_samples, found.exact) == (4, 3, False)
    assert found.nats_per_token != one
    assert abs(found.nats_per_token - one) < 8 * found.noise_standard_error
    both = math.hypot(found.noise_standard_error, found.text_standard_error)
    assert found.standard_error == pytest.approx(both) and found.noise_standard_error > 0


def _first_pass(run: Path, request: Request) -> float:
    from megatron_bit.evaluation.progress import Progress
    from megatron_bit.evaluation.scoring import score
    from megatron_bit.evaluation.validation import Validation

    model = open_model(run)
    assert model.training is not None and request.samples is not None
    rows = Validation(model, model.training.data.path).samples(request.samples, model.context)
    seed = model.training.train.seed
    nats = score(model, rows, seed=seed, batch_size=5, progress=Progress("x"))
    return float(torch.stack(nats).double().mean())


@pytest.mark.parametrize("name", ["chain", "softmax"])
def test_a_converted_folder_is_the_run(
    name: str, runs: dict[str, Path], folders: dict[str, Path], tiny_data: Path
) -> None:
    """Its tokenizer is another file, so that the text is tokenized again; into the same tokens."""
    request = replace(NOTHING, likelihood=True, samples=40, texts=3, scorer=folders["uniform"])
    run = evaluate(runs[name], request)
    folder = evaluate(folders[name], replace(request, data=str(tiny_data)))
    assert run.likelihood is not None and folder.likelihood is not None
    assert run.likelihood.samples == folder.likelihood.samples
    assert run.likelihood.nats_per_token == pytest.approx(folder.likelihood.nats_per_token, abs=1e-5)
    assert run.likelihood.bits_per_byte == pytest.approx(folder.likelihood.bits_per_byte, rel=0.02)
    assert run.samples is not None and folder.samples is not None
    assert run.samples.real == folder.samples.real
    made = [open_model(path).generate([[], []], 8, [0, 7], 5, {}) for path in (runs[name], folders[name])]
    assert made[0] == made[1]  # as text, bytes that are no UTF-8 may differ (docs/inference.md)


@pytest.mark.parametrize("name", HEADS)
def test_nothing_depends_on_the_batch(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    tasks = _tasks(tmp_path)
    request = replace(
        NOTHING, texts=5, scorer=runs["groups"], prefix=4, tasks=("lambada", "blimp"), tasks_data=tasks, seed=3
    )
    one, five = (evaluate(runs[name], replace(request, batch_size=size)) for size in (1, 5))
    assert one.samples is not None and five.samples is not None
    assert one.samples.first == five.samples.first
    for ours, theirs in zip(_numbers(one), _numbers(five), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)  # float32 sums, in another order
    other = evaluate(runs[name], replace(request, seed=4))
    assert other.samples is not None and other.samples.first != one.samples.first


def _numbers(report: Report) -> list[float]:
    from dataclasses import asdict

    def walk(node: Any) -> list[float]:
        if isinstance(node, dict):
            return [x for value in node.values() for x in walk(value)]
        if isinstance(node, list | tuple):
            return [x for value in node for x in walk(value)]
        return [float(node)] if isinstance(node, int | float) else []

    return walk(asdict(report))


def test_a_scorer_whose_answer_is_known(runs: dict[str, Path], folders: dict[str, Path]) -> None:
    found = evaluate(runs["chain"], replace(NOTHING, texts=4, tokens=90, scorer=folders["uniform"])).samples
    assert found is not None
    for of in (found.generated, found.real):  # 90 tokens are more than its context of 36
        assert of.nats_per_token == pytest.approx(math.log(VOCAB_SIZE), abs=1e-5)
        assert of.standard_error == pytest.approx(0.0, abs=1e-5)
        assert of.nats_per_byte == pytest.approx(math.log(VOCAB_SIZE) * of.tokens / of.bytes, rel=1e-5)
        assert 0 < of.unigram_entropy < math.log(90) and of.distinct[0] < of.distinct[2] <= 1
    assert found.real.tokens == 360  # of the same tokenizer
    assert "not computed" in render(evaluate(runs["chain"], replace(NOTHING, texts=2, scorer=folders["uniform"])))


def test_greedy_is_what_generation_does(runs: dict[str, Path], folders: dict[str, Path]) -> None:
    contexts = [[5, 6, 7, 8], [300, 2, 9], [4] * 40]
    chain = open_model(runs["chain"])
    made = chain.generate(contexts[:1], 4, [0], 0, {"temperature": 0.0})[0]
    assert chain.greedy(contexts[:1] * 3, [made[:1], made, [*made[:3], made[3] ^ 1]]) == [True, True, False]
    soft = open_model(folders["softmax"])
    made = [soft.generate([c[-30:]], 3, [0], 9, {"temperature": 0.0})[0] for c in contexts]
    assert soft.greedy([c[-30:] for c in contexts], made) == [True] * 3
    assert soft.greedy(contexts[:1] * 2, [[made[0][0]], [made[0][0] ^ 1]]) == [True, False]
    theirs: Any = soft._model.generate(torch.tensor([[0, *contexts[0]]]), do_sample=False, max_new_tokens=3)  # type: ignore[attr-defined]
    assert theirs[0, 5:].tolist() == made[0][: theirs.shape[1] - 5]
    assert open_model(runs["bits"]).greedy(contexts, contexts) is None


def test_a_softmax_draws_from_its_distribution() -> None:
    u = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    logits = torch.tensor([0.5, 0.2, 0.0, 0.3], dtype=torch.float64).log().expand(1000, 4)
    assert torch.bincount(_draw(logits, u, 1.0), minlength=4).tolist() == [500, 200, 0, 300]
    assert set(_draw(logits, u, 0.0).tolist()) == {0}
    half = torch.bincount(_draw(logits, u, 0.5), minlength=4) / 1000
    torch.testing.assert_close(half, torch.tensor([0.25, 0.04, 0.0, 0.09]) / 0.38, atol=2e-3, rtol=0)


def _tasks(folder: Path) -> Path:
    for name in ("lambada", "blimp"):
        (folder / name).mkdir()
    texts = ["def f(x):\n    return x", "import os, sys and then some more of the words that a long text has x y"]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "lambada" / "lambada_test.jsonl").write_text("\n".join(lines))
    pairs = [json.dumps({"sentence_good": f"{a} is.", "sentence_bad": f"{a} are here."}) for a in ("He", "A cat", "It")]
    (folder / "blimp" / "pairs.jsonl").write_text("\n".join(pairs))
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["megatron-bit", "evaluate", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def test_the_command(
    command: Callable[..., tuple[int, str, str]], runs: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    tasks, file = _tasks(tmp_path), tmp_path / "report.json"
    words = [runs["groups"], "--samples", 4, "--tolerance", 9, "--texts", 2, "--tokens", 9, "--steps", 3]
    words += [
        "--guidance",
        2,
        "--scorer",
        folders["uniform"],
        "--tasks",
        "lambada",
        "blimp",
        "--tasks-data",
        tasks,
        "--limit",
        2,
    ]
    code, out, err = command(*words, "--out", file)
    assert (code, err) == (0, "")
    for part in ("nats/token", "bits/byte", "unigram entropy", "distinct-3", "generated", "real", "chance", "0.500"):
        assert part in out
    assert "passes of 3 noise levels" in out and "greedy generation is not defined for a diffusion head" in out
    code, text, err = command(*words, "--json")
    assert (code, err) == (0, "") and json.loads(text) == json.loads(file.read_text())
    report = json.loads(text)
    assert report["head"] == "diffusion" and report["samples"]["how"] == {"steps": 3, "guidance": 2.0}
    assert [task["items"] for task in report["tasks"]] == [2, 2]


def test_mistakes(
    command: Callable[..., tuple[int, str, str]], runs: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "no such thing"}')
    chain, bits = runs["chain"], runs["bits"]
    scored = ["--texts", 2, "--scorer", folders["softmax"]]
    for words, said in (
        ([tmp_path / "none"], "none is not a folder"),
        ([tmp_path / "empty"], "empty"),
        ([tmp_path / "foreign"], "foreign cannot be read as a causal language model of transformers"),
        ([folders["chain"]], "does not say where validation text is: give --data DIR, or --no-likelihood"),
        ([chain, "--data", tmp_path / "empty"], "manifest.json"),
        ([chain, "--tasks", "glue", "--tasks-data", tmp_path], "--tasks glue does not exist; choose of lambada"),
        ([chain, "--tasks", "piqa"], "--tasks-data DIR"),
        ([chain, "--tasks", "piqa", "--tasks-data", tmp_path], "valid-labels.lst does not exist"),
        ([chain, "--texts", 3], "--scorer PATH"),
        ([chain, "--texts", 3, "--scorer", tmp_path / "none"], "--scorer"),
        ([chain, "--scorer", bits], "--scorer has no use without --texts"),
        ([chain, "--limit", 3], "--limit has no use without --tasks"),
        ([chain, "--no-likelihood"], "nothing to do"),
        ([chain, "--no-likelihood", "--samples", 4, *scored], "--samples has no use without --likelihood"),
        ([chain, "--tolerance", 0.1], "--tolerance is about noise, and the likelihood of a chain head has none"),
        ([chain, *scored, "--steps", 4], "steps means nothing to a chain head"),
        ([chain, *scored, "--guidance", 2], "guidance 2 needs a model trained with diffusion.condition_drop above 0"),
        ([runs["groups"], *scored, "--guidance", -1], "--guidance -1.0 has to be 0 (without the backbone) or above"),
        ([runs["softmax"], *scored, "--guidance", 2], "guidance means nothing to a softmax head"),
        ([runs["softmax"], *scored, "--sampler", "ode"], "sampler means nothing to a softmax head"),
        ([bits, *scored, "--sampler", "magic"], "--sampler magic does not exist"),
        ([runs["softmax"], *scored, "--tokens", 40], "more than the 36"),
        ([bits, *scored, "--tokens", 10**6], "pieces of 1000000 tokens"),
        ([bits, "--batch-size", 0], "--batch-size 0 has to be at least 1"),
        ([bits, "--seed", 2**63], "--seed 9223372036854775808 has to be below 2^63"),
        ([bits, "--tolerance", 0], "--tolerance 0.0 has to be above 0"),
        ([folders["chain"], "--no-likelihood", "--data", "x", "--tasks", "blimp"], "--tasks-data"),
        ([chain, "--samples", 4, "--out", tmp_path / "none" / "x"], "cannot be written: there is no folder"),
        ([bits, "--weights", "ema"], "ema"),
        ([folders["chain"], "--weights", "ema"], "--weights ema has no use here"),
        ([chain, "--samples", 4, "--out", tmp_path], "cannot be written: it is a folder"),
    ):
        code, out, err = command(*words)
        assert (code, out) == (2, ""), (words, out, err)
        assert err.startswith("megatron-bit: error: ") and err.count("\n") == 1 and said in err, (words, err)
