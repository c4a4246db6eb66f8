"""Hand a job to SLURM once. An sbatch whose answer gets lost may have queued it, and another would queue a second one.

Each job gets a token, in its comment and as its script's argument, which is in jobs.jsonl before sbatch is called. By
it the job is found when SLURM answers again: by the `submit` that waits, or by the next command about the run. A job
says who it is when it begins, too, and one that was queued a second time ends then (attempts.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from mbit_launcher import slurm
from mbit_launcher.profile import ClusterProfile
from mbit_launcher.silence import Patience, Silent
from mbit_launcher.submission import Submission, new_token
from megatron_bit.errors import UserError


class Unknown(Silent):
    """Whether a job is queued could not be found out."""


SETTLE_SECONDS = 5.0  # a request that waited while SLURM was silent is carried out about when the next one is answered


def queue(made: Sequence[Submission], profile: ClusterProfile, options: Sequence[str], patience: Patience) -> list[str]:
    """Queue the script of the first for all of `made`, tasks of an array if there are several; their jobs, in order.

    Raises:
        Unknown: SLURM has not answered, and may have queued the job.
        Silent: it has not answered, and has not queued it.
        UserError: SLURM refuses.
    """
    token, first = new_token(), made[0]
    for task, submission in enumerate(made):
        submission.ask_job(token, first.logs, task if len(made) > 1 else None)
    try:
        job = _sbatch(first, token, [*options, f"--comment={_comment(profile, token)}"], patience)
    except Unknown:
        raise
    except UserError as error:
        for submission in made:
            submission.drop_job(token, str(error))
        raise
    return [submission.add_job(token, job) for submission in made]


def settle(submission: Submission) -> list[str]:
    """Find out whether jobs were queued whose answers were lost; those that were. Raises Silent."""
    found = []
    for token in submission.unanswered():
        jobs = _find(token)
        if jobs:
            found.append(submission.add_job(token, jobs[0]))
        else:
            submission.drop_job(token, "SLURM does not have it")
    return found


def _sbatch(submission: Submission, token: str, options: Sequence[str], patience: Patience) -> str:
    """The job. Raises Unknown; or Silent or another UserError, and then SLURM does not have it."""
    lost: Silent | None = None
    while True:
        try:
            job = slurm.sbatch(submission.script, token, *options)
        except Silent as silence:
            lost = silence
            patience.begin(silence)
            if jobs := _look(token, lost, patience):
                return jobs[0]
            try:
                patience.wait(silence)
            except Silent:
                advice = "the job is not queued; submit it again when `scontrol ping` says that SLURM is up"
                raise Silent(silence.what, advice) from None
        except UserError:
            if lost and (jobs := _look(token, lost, patience)):  # refused because it is there: a limit of one job
                return jobs[0]
            raise
        else:
            if lost and (more := [other for other in _look(token, lost, patience) if other != job]):
                slurm.scancel(more)  # the first request was only slow
            return job


def _look(token: str, lost: Silent, patience: Patience) -> list[str]:
    """The jobs that SLURM has queued with a token, when it answers again. Raises Unknown."""
    try:
        return patience.ask(lambda: _find(token))
    except UserError:
        advice = (
            "whether the job is queued is not known; the same command finds out, and does not queue a second one, when "
            "`scontrol ping` says that SLURM is up"
        )
        raise Unknown(lost.what, advice) from None


def _find(token: str) -> list[str]:
    jobs = slurm.queued(token)
    if not jobs:
        time.sleep(SETTLE_SECONDS)
        jobs = slurm.queued(token)
    return jobs


def _comment(profile: ClusterProfile, token: str) -> str:
    """The token behind the profile's own comment, whose place the option on sbatch's command line takes."""
    own = [match[1] for word in profile.sbatch if (match := re.fullmatch(r"--com(?:m|me|men|ment)?=(.*)", word))]
    return " ".join([*own[-1:], token])
