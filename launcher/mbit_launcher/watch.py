"""The watchdog of an attempt: ends when somebody has to act.

    python -m mbit_launcher.watch SUBMISSION ATTEMPT

Exit code 3: no rank has done a step for `hang_timeout` (before the first step: `start_timeout`), and the file `hung` in
the attempt's log folder says which step each rank is at. 4: RUN/STOP is there. Until then it runs; job.sh ends it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mbit_launcher import heartbeats
from mbit_launcher.attempts import HUNG
from mbit_launcher.heartbeats import Heartbeat
from mbit_launcher.submission import Submission

HANGS, STOP = 3, 4


def watch(submission: Submission, attempt: str) -> int:
    """Poll until something is to be said; the exit code."""
    profile, run = submission.profile(), submission.run
    config_ranks = profile.world_size
    pause = min(5.0, profile.hang_timeout / 10)
    last: list[int] = []
    since = time.monotonic()  # of this machine: clocks of nodes differ
    while True:
        if (run / "STOP").exists():
            print(f"{run / 'STOP'} is there", flush=True)
            return STOP
        beats = heartbeats.read(run, attempt)
        steps = [beat.step for beat in beats]
        if steps != last:
            last, since = steps, time.monotonic()
        started = any(beat.done for beat in beats)
        limit = profile.hang_timeout if started else profile.start_timeout
        if time.monotonic() - since > limit:
            text = describe(beats, config_ranks, limit, started)
            (submission.logs / attempt / HUNG).write_text(text + "\n")
            print(text, flush=True)
            return HANGS
        time.sleep(pause)


def describe(beats: Sequence[Heartbeat], ranks: int, limit: float, started: bool) -> str:
    """One line: how long, and which ranks are behind."""
    if not started:
        missing = sorted(set(range(ranks)) - {beat.rank for beat in beats})
        who = f"ranks {missing[:8]} have not come to training" if missing else "all ranks have come to training"
        return f"no rank has done its first step in start_timeout {limit:.0f} s; {who}"
    furthest = max(beat.step for beat in beats)
    behind = [f"rank {b.rank} on {b.host} (step {b.step})" for b in beats if b.step < furthest]
    who = (
        f"behind are {', '.join(behind[:8])}" if behind else "all ranks have done it; their stacks say where each waits"
    )
    return f"no rank has done a step for hang_timeout {limit:.0f} s; the last was {furthest}; {who}"


if __name__ == "__main__":
    sys.exit(watch(Submission(Path(sys.argv[1])), sys.argv[2]))
