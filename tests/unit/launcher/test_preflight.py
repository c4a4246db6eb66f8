"""Which nodes are bad, and when it is not the nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from mbit_launcher.preflight import cordoned, judge, problems
from mbit_launcher.profile import ClusterProfile
from mbit_launcher.submission import Submission

PROFILE = ClusterProfile(gpus_per_node=2)


def _node(late: float = 0.2, free: float = 100, gpus: Any = ((3, 0), (3, 0))) -> dict[str, Any]:
    if not isinstance(gpus, str):
        keys = ("index", "memory.used", "ecc.errors.uncorrected.volatile.total")
        gpus = [dict(zip(keys, (str(i), str(used), str(ecc)), strict=True)) for i, (used, ecc) in enumerate(gpus)]
    return {"late": late, "free": {"/tmp": free * 2**30}, "gpus": gpus}


BAD = {
    "clock is +101 s off": _node(late=101.2),
    "clock is -3600 s off": _node(late=-3599.8),
    "1.0 GiB free in /tmp, less than 5": _node(free=1),
    "1 of 2 GPUs": _node(gpus=((3, 0),)),
    "GPU 1 is not idle: 9000 MiB are in use": _node(gpus=((3, 0), (9000, 0))),
    "GPU 0 has had 4 uncorrectable memory errors": _node(gpus=((3, 4), (3, 0))),
    "nvidia-smi has not answered for 60 s": _node(gpus="nvidia-smi has not answered for 60 s"),
    "did not answer": None,
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_node_among_good_ones(text: str) -> None:
    fit = _node(late=0.3, gpus=((3, "[N/A]"), (3, "[N/A]")))  # consumer cards count no errors
    assert problems({"n1": _node(), "n2": BAD[text], "n3": fit}, PROFILE) == {"n2": text}


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    folder = tmp_path / "run" / "slurm" / "0000"
    (folder / "logs" / "9.0").mkdir(parents=True)
    (folder / "cluster.yaml").write_text(yaml.safe_dump({"gpus_per_node": 2}))
    return Submission(folder)


def _judge(submission: Submission, **nodes: dict[str, Any] | None) -> int:
    for node, report in nodes.items():
        if report is not None:
            (submission.logs / "9.0" / f"preflight-{node}.json").write_text(json.dumps(report))
    return judge(submission, "9.0", list(nodes))


def test_a_bad_node_is_cordoned_once(submission: Submission) -> None:
    for _ in range(2):
        assert _judge(submission, n1=_node(), n2=_node(free=1)) == 1
    assert cordoned(submission.run / "slurm" / "cordon") == ["n2"]
    assert "node n2: 1.0 GiB free" in (submission.logs / "9.0" / "bad_nodes").read_text()


@pytest.mark.parametrize("nodes", [{"n1": _node(free=1), "n2": _node(free=1)}, {"n1": None, "n2": None}, {"n1": None}])
def test_what_all_nodes_share_is_no_nodes_fault(submission: Submission, nodes: dict[str, Any]) -> None:
    assert _judge(submission, **nodes) == 1
    assert cordoned(submission.run / "slurm" / "cordon") == []


def test_the_only_node_can_be_bad(submission: Submission) -> None:
    assert _judge(submission, n1=_node(gpus=((3, 1), (3, 0)))) == 1
    assert cordoned(submission.run / "slurm" / "cordon") == ["n1"]


def test_good_nodes(submission: Submission) -> None:
    assert _judge(submission, n1=_node(), n2=_node(late=3)) == 0
    assert not (submission.logs / "9.0" / "bad_nodes").exists()


def test_a_cordon_file_is_for_people_too(tmp_path: Path) -> None:
    (tmp_path / "cordon").write_text("# ours\nn3  # slow\n\n  n4\nn3\n")
    assert cordoned(tmp_path / "cordon") == ["n3", "n4"]
