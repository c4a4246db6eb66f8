"""A job knows its run folder by the lock that it holds there."""

from __future__ import annotations

from pathlib import Path

from megatron_bit.run.lock import RunLock


def test_a_folder_that_is_another_now(tmp_path: Path) -> None:
    run, away = tmp_path / "run", tmp_path / "away"
    run.mkdir()
    first, second = RunLock(run), RunLock(run)
    assert first.lost() == "", "it holds none yet"
    assert first.acquire() is None and first.lost() == ""
    run.rename(away)
    assert first.lost() == f"run folder {run} is gone: it was removed or moved away"
    run.mkdir()
    assert "is gone" in first.lost(), "the new folder has no lock yet"
    assert second.acquire() is None, "and is nobody's"
    assert first.lost() == f"run folder {run} is another one than this job began in: it was replaced"
    assert second.lost() == ""
    run.rename(tmp_path / "of the second")
    away.rename(run)
    assert first.lost() == "" and "was replaced" in second.lost()
    first.release()
    second.release()
    assert first.lost() == ""
