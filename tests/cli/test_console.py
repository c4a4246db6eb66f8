"""Standard output is not the run: it may go away, be full or never have been there."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from as_user import COMMAND, Running, environment

from megatron_bit import cli

SETTINGS = ("train.steps=12", "log.every=1", "checkpoint.every=100", "train.micro_batch_size=4")


def _head(words: list[str]) -> int:
    """As `| head -2`: reads two lines and leaves."""
    process = subprocess.Popen(words, env=environment(PYTHONUNBUFFERED="1"), stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(2):
        process.stdout.readline()
    process.stdout.close()
    return process.wait(60)


def _shell(redirection: str, words: list[str]) -> int:
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "bash", *words], env=environment(), timeout=60
    ).returncode


ENDS = {
    "a pipe that nobody reads": _head,
    "a full disk": lambda words: _shell(">/dev/full", words),
    "both on a full disk": lambda words: _shell(">/dev/full 2>&1", words),
    "a closed descriptor": lambda words: _shell(">&-", words),
    "all closed": lambda words: _shell("<&- >&- 2>&-", words),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_run_goes_on(name: str, ranks: int, train_args: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    several = ["--nproc", "2"] if ranks > 1 else []
    assert ENDS[name]([COMMAND, *train_args(run, *SETTINGS), *several]) == 0
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 13))
    noted = [record["console"] for record in records if "console" in record]
    closed = "closed" in name  # a descriptor that was never there is not missed
    assert len(noted) == (0 if closed else 1) and all(text.startswith("lost: ") for text in noted)
    assert (run / "FINISHED").exists() and (run / "checkpoints" / "step-00000012").is_dir()


def test_a_lost_terminal_saves(train_args: Any, tmp_path: Path) -> None:
    """SIGHUP, with one process as with several; under nohup it is nothing."""
    settings = (*SETTINGS, "train.steps=100000")
    job = Running(*train_args(tmp_path / "one", *settings))
    job.wait_for("step 3/")
    job.process.send_signal(signal.SIGHUP)
    assert job.end() == 85, "".join(job.lines)
    assert list((tmp_path / "one" / "checkpoints").glob("step-*/COMMITTED"))
    job = Running(*train_args(tmp_path / "two", *settings), command=("nohup", COMMAND))
    job.wait_for("step 3/")
    job.process.send_signal(signal.SIGHUP)
    job.wait_for("step 30/")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 85


@pytest.mark.parametrize("words", [["plan", "--preset", "8b", "--nodes", "8"], ["config"]])
def test_a_reader_that_leaves_is_no_failure(words: list[str]) -> None:
    """`megatron-bit plan ... | head -0`: what other programs do then."""
    process = subprocess.Popen([COMMAND, *words], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""


def test_another_broken_pipe_is_a_failure(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def broken(argv: list[str]) -> int:
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(cli, "_dispatch", broken)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1 and capfd.readouterr().err == "failed: of a worker\n"
