"""Twenty faults at random; `make kill N=1000` for more."""

from __future__ import annotations

import os
from pathlib import Path

from kill import campaign


def test_runs_that_are_struck_end_as_runs_that_are_not(tiny_data: Path, tmp_path: Path) -> None:
    count, seed = int(os.environ.get("MBIT_KILL_FAULTS", "20")), int(os.environ.get("MBIT_KILL_SEED", "1"))
    results = campaign.campaign(
        count, campaign.from_seed(seed), tiny_data, tmp_path / "kill", workers=len(os.sched_getaffinity(0))
    )
    print(campaign.table(results))
    assert sum(len(result["faults"]) for result in results) >= count
    assert [result for result in results if result["problems"]] == []
