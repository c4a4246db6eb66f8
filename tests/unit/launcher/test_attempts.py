"""Whether another attempt follows."""

from __future__ import annotations

from pathlib import Path

import pytest
from mbit_launcher.attempts import Attempt, Facts, decide, read
from mbit_launcher.submission import append_line

from megatron_bit.errors import UserError


def _attempt(outcome: str, step: int, number: int = 0) -> Attempt:
    return Attempt(f"9.{number}", "9", "n1", 0.0, 0, 1.0, step, outcome, "", True)


UNHEARD = Facts(step=7, rank_lost="rank 3 on n2 did not answer", status=1, error="rank 0 on n1: rank 3 on n2 ...")
CRASH, BAD = Facts(step=7, status=1), Facts(step=7, bad_nodes="node n1: 3 of 8 GPUs")

CASES = {
    "finished": ([], Facts(step=9, finished=True, status=1), "finished", False),
    "finished while SLURM stops it": ([], Facts(step=9, finished=True, asked=True), "finished", False),
    "diverged": ([], Facts(step=7, diverged="run has diverged", status=1), "diverged", False),
    "STOP": ([], Facts(step=7, stop_file=True, asked=True), "stopped", False),
    "STOP and a crash": ([], Facts(step=7, stop_file=True, status=1), "stopped", False),
    "train.stop_at": ([], Facts(step=7, stop_at=True), "stop_at", False),
    "time limit": ([], Facts(step=7, asked=True), "asked", True),
    "limits too short for a step": ([_attempt("asked", 7)] * 4, Facts(step=7, asked=True), "asked", False),
    "four times, and then a step": ([_attempt("asked", 7)] * 4, Facts(step=8, asked=True), "asked", True),
    "cancelled": ([], Facts(step=7, taken="COMPLETING", status=1), "taken", True),
    "crash": ([], CRASH, "crashed", True),
    "crash at another step": ([_attempt("crashed", 6)], CRASH, "crashed", True),
    "crash at the same step": ([_attempt("crashed", 7)], CRASH, "crashed", False),
    "the same step, with others between": ([_attempt("crashed", 7), _attempt("asked", 8)], CRASH, "crashed", False),
    "hang where it crashed": ([_attempt("crashed", 7)], Facts(step=7, hung="no step for 9 s"), "hung", False),
    "a lost node says nothing of the step": ([_attempt("lost", 7), _attempt("taken", 7)], CRASH, "crashed", True),
    "a rank that does not answer": ([], UNHEARD, "lost", True),
    "the same at the same step": ([_attempt("lost", 7)] * 3, UNHEARD, "lost", True),
    "the same where it crashed": ([_attempt("crashed", 7)], UNHEARD, "lost", True),
    "a crash where a rank did not answer": ([_attempt("lost", 7)], CRASH, "crashed", True),
    "never heard of": ([_attempt("lost", step) for step in range(10)], UNHEARD, "lost", False),
    "a rank that does not answer, and STOP": ([], Facts(step=7, rank_lost="r", stop_file=True), "stopped", False),
    "ended in silence": ([], Facts(step=7), "crashed", True),
    "bad node": ([_attempt("preflight", 7)], BAD, "preflight", True),
    "bad nodes all the time": ([_attempt("preflight", 7)] * 2, BAD, "preflight", False),
    "bad nodes now and then": ([_attempt("preflight", 7), _attempt("asked", 7)], BAD, "preflight", True),
    "too many restarts": ([_attempt("asked", step) for step in range(10)], Facts(step=20, asked=True), "asked", False),
    "one restart left": ([_attempt("asked", step) for step in range(9)], Facts(step=20, asked=True), "asked", True),
}


@pytest.mark.parametrize("name", CASES)
def test_decide(name: str) -> None:
    history, facts, outcome, again = CASES[name]
    assert decide(history, facts, max_restarts=10)[::2] == (outcome, again)


def test_reasons_say_what_happened() -> None:
    assert "rank 3 on n2: ValueError" in decide([], Facts(step=7, error="rank 3 on n2: ValueError: x"), 9)[1]
    assert "exit code 137" in decide([], Facts(step=7, status=137), 9)[1]
    assert "max_restarts 0 reached" in decide([], CRASH, 0)[1]


def test_a_record_survives_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    append_line(path, vars(Attempt("9.0", "9", "n1", 0.0, 0)))
    with open(path, "a") as file:
        file.write('{"attempt": "9.0", "outco')
    append_line(path, {"attempt": "9.0", "outcome": "lost", "step": 4})
    (attempt,) = read(path)
    assert (attempt.outcome, attempt.step, attempt.nodes) == ("lost", 4, "n1")


@pytest.mark.parametrize(
    "record",
    [
        '{"attempt": "1.0", "job": 7}',
        '{"attempt": "1.0"}',
        '{"attempt": {}}',
        '{"attempt": "1.0", "begin": "x"}',
        "[1]",
        "7",
    ],
)
def test_records_of_something_else(record: str, tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    path.write_text(f"{record}\n")
    if not record.startswith("{"):
        assert read(path) == []
        return
    with pytest.raises(UserError, match=r"attempts.jsonl is damaged: \w+ = "):
        read(path)
