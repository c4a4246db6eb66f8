"""The ladder of `bench quality`: equal sizes, distinct rungs, and a table from runs that are there."""

import json
import os
from pathlib import Path

import pytest

from megatron_bit.bench.commands import Commands
from megatron_bit.bench.ladder import REFERENCE, fit_width, ladder, peer_of, select
from megatron_bit.bench.quality import main
from megatron_bit.bench.report import Result, render
from megatron_bit.bench.sizes import SIZES
from megatron_bit.config import load_config
from megatron_bit.errors import EXIT_PREEMPTED, UserError
from megatron_bit.planning.parameters import parameter_counts, table_parameters


@pytest.mark.parametrize("budget", SIZES)
@pytest.mark.parametrize("bits", [10, 15])
def test_every_rung_has_the_same_parameters_without_tables(budget, bits):
    common = [*SIZES[budget], f"model.bits={bits}", f"model.vocab_size={2**bits}"]
    target = load_config(preset="laptop", overrides=[*common, *REFERENCE])

    def rest(config):
        return sum(parameter_counts(config).values()) - table_parameters(config)

    seen = set()
    for rung in ladder(bits, target.model.num_layers + target.model.head.num_layers):
        config = fit_width(load_config(preset="laptop", overrides=[*common, *rung.overrides]), target)
        assert rest(config) == pytest.approx(rest(target), rel=0.02), rung.name
        assert rung.slug not in seen
        seen.add(rung.slug)
    assert {"ar-softmax", "chain-k-4-g-8-semantic", "diffusion-k-4-g-1-binary"} <= seen


@pytest.mark.parametrize("budget", SIZES)
def test_a_rung_has_of_names_and_prior_what_its_name_says(budget):
    """Whatever the preset has that it begins from."""
    for rung in ladder(10, 6):
        config = load_config(preset="laptop", overrides=[*SIZES[budget], "model.bits=10", *rung.overrides])
        model = config.model
        assert (config.diffusion.levels_apart > 0) == ("levels apart" in rung.name), rung.name
        assert (config.noisy_every > 0) == ("noisy blocks" in rung.name), rung.name
        tied = model.head.hidden_size if "tied prior" in rung.name else 0
        assert (model.pairs, model.prior_rank) == ("names" in rung.name, tied), rung.name
        assert (model.token_before, model.soft_prior) == ("token before" in rung.name, "soft prior" in rung.name)


def test_rungs_differ_in_what_their_names_say():
    by_name = {rung.name: dict(item.split("=") for item in rung.overrides) for rung in ladder(10, 6)}
    for name, settings in by_name.items():
        words = name.replace(",", "").split()
        kind = {"AR": "softmax"}.get(words[0], words[0])
        assert settings["model.head.kind"] == kind
        for word in words:
            if word.startswith("K="):
                assert settings["model.block_size"] == word[2:]
            if word.startswith("g="):
                assert settings["model.group_bits"] == word[2:]
            if word in ("binary", "semantic", "random"):
                assert settings["model.code"] == word
    assert len({tuple(sorted(settings.items())) for settings in by_name.values()}) == len(by_name)


def test_a_size_that_cannot_be_reached_is_said():
    small = load_config(preset="laptop", overrides=["model.vocab_size=512"])
    with pytest.raises(UserError, match="no width of the backbone gives"):
        fit_width(small, load_config(preset="125m", overrides=["model.vocab_size=512"]))


def test_table_holds_mean_range_and_distance():
    rungs = {rung.name: rung for rung in ladder(10, 6)}

    def result(name, seed, nats):
        return Result(
            rungs[name], seed, nats, 0.01, 60.0, 5e6, {"rest": 7, "tables": 3}, "one\n two" if seed == 0 else ""
        )

    chain = "chain K=4 g=8 semantic"
    results = [result("AR softmax", 0, 4.0), result("AR softmax", 1, 4.2), result(chain, 0, 4.5)]
    about = {"command": "x", "machine": "y", "minutes": 1, "tokens": 10, "vocabulary": 4}
    table = render(about, results)
    assert "| AR softmax | 4.100 | 0.010 | 2 (4.000-4.200) |  | 7 | 3 | 5.0 | 60 |" in table
    assert f"| {chain} | 4.500 | 0.010 | 1 | +0.400 |" in table
    assert f"- {chain}: one two" in table


def test_a_memory_has_a_peer_of_its_own():
    rungs = {rung.name: rung for rung in ladder(10, 6)}
    ours = "chain K=4 g=8 semantic, names, tied prior, memory"
    assert peer_of(ours) == "AR softmax, memory" and peer_of(ours[: -len(", memory")]) == "AR softmax"
    nats = {"AR softmax": 4.0, "AR softmax, memory": 3.7, ours: 3.75}
    results = [
        Result(rungs[name], 0, value + less, 0.01, 60.0, 5e6, {"rest": 7, "tables": 3}, tokens=tokens)
        for name, value in nats.items() for tokens, less in ((10, 1.0), (20, 0.0))
    ]  # fmt: skip
    table = render({"command": "x", "machine": "y", "minutes": 1, "tokens": 20, "vocabulary": 4}, results)
    assert "| seeds | minus AR | minus AR, memory | parameters" in table
    assert f"| {ours} | 3.750 | 0.010 | 1 | -0.250 | +0.050 | 7 |" in table
    assert f"| {ours} | 4.750 | +0.050 | 3.750 | +0.050 |" in table  # of the curves, like against like


def test_which_rungs_run():
    rungs = ladder(10, 6)
    default = select(rungs, (), False)
    assert select(rungs, (), True) == rungs and len(default) < len(rungs)
    assert {f"{kind} K={k} g=" for kind in ("chain", "diffusion") for k in (1, 2, 4, 8)} <= {
        rung.name[: rung.name.index("g=") + 2] for rung in default if "g=" in rung.name
    }
    (alone,) = select(rungs, ("chain K=4 g=8 semantic",), False)
    assert alone.name == "chain K=4 g=8 semantic"  # and not all whose names begin so
    assert not [r for r in ladder(13, 6) if "g=10" in r.name]  # its groups would be those of g=8
    windows = select(rungs, ("window",), False)
    assert [rung.name.split()[-1] for rung in windows] == ["1", "4", "16"] and not set(windows) & set(default)
    assert set(select(rungs, ("window", "mse"), False)) > set(windows)
    for only in (("window", "widow"), ("window", "train.seed=3")):  # such a pair behind the option is one of its values
        with pytest.raises(UserError, match=f"--only '{only[1]}' is no rung of the ladder") as said:
            select(rungs, only, False)
        assert ("key=value pairs go before the options" in str(said.value)) == ("=" in only[1])


def test_runs_are_trained_once_and_read_again(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Two rungs through the real command; the second start finds them finished."""
    extra = ["evaluate.samples=8", "data.seq_length=32", "model.bits=9"]
    arguments = ("small", tmp_path / "q", tiny_data, 2, 1, 2, ["AR softmax", "g=8 binary"], False, extra, True)
    main(*arguments)
    first = json.loads(capsys.readouterr().out)
    assert [r["rung"] for r in first["results"]] == ["AR softmax", "chain K=4 g=8 binary"]
    assert all(4.0 < r["nats"] < 7.0 and r["standard_error"] > 0 for r in first["results"])
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "q" / "runs").rglob("*.jsonl")}
    main(*arguments)
    again = json.loads(capsys.readouterr().out)
    assert [r["nats"] for r in again["results"]] == [r["nats"] for r in first["results"]]
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "q" / "runs").rglob("*.jsonl")}
    with pytest.raises(UserError, match="is no rung of the ladder"):
        main("small", tmp_path / "q", tiny_data, 2, 1, 2, ["nothing"], False, extra, True)
    # what is there is not shown as what was asked for
    with pytest.raises(UserError, match=r"q/runs/ar-softmax-0 was trained with optim.lr=0.006, and .* 0.003; give ano"):
        main("small", tmp_path / "q", tiny_data, 2, 1, 2, ["AR softmax"], False, [*extra, "optim.lr=3e-3"], True)
    with pytest.raises(UserError, match=r"trained with train.steps=2, and the command says 3"):
        main("small", tmp_path / "q", tiny_data, 3, 1, 2, ["AR softmax"], False, extra, True)
    with pytest.raises(UserError, match=r"trained with optim.schedule=cosine, and the command says wsd"):
        main("small", tmp_path / "q", tiny_data, None, 1, 2, ["AR softmax"], False, extra, True, ["40k"])


@pytest.mark.slow
def test_a_run_whose_time_is_over_goes_on(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    extra = ["evaluate.samples=8", "data.seq_length=32", "model.bits=9", "log.every=1"]
    arguments = ("small", tmp_path / "q", tiny_data, 400, 1, 2, ["AR softmax"], False, extra, True)
    run = tmp_path / "q" / "runs" / "ar-softmax-0"
    assert main(*arguments, minutes=0.08) == EXIT_PREEMPTED  # a start alone takes seconds
    said = capsys.readouterr()
    assert said.out == "" and "1 of 1 runs are unfinished; the same command goes on" in said.err
    before = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []
    assert main(*arguments) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["tokens"] == 400 * 4 * 32
    after = (run / "log.jsonl").read_text().splitlines()
    assert len(before) < 400 and after[: len(before)] == before  # what was saved is not trained again
    assert [json.loads(line)["step"] for line in after] == list(range(1, 401))


@pytest.mark.parametrize(("allowed", "jobs", "threads"), [({0}, 1, "1"), ({0, 3, 5, 7}, 2, "2"), ({0, 1}, 4, "1")])
def test_runs_share_the_cores_that_the_job_may_use(monkeypatch, allowed, jobs, threads):
    """And not those that the machine has: threads that wait for one another on one core take 40 times as long."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    assert Commands(jobs, None).environment["OMP_NUM_THREADS"] == threads
