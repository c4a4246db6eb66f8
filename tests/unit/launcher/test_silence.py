"""SLURM's silence: what is one, and what `submit`, `status` and a job make of it. SLURM is played by small programs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import manifests
import pytest
from mbit_launcher import attempts, logs, queueing, silence, slurm, status
from mbit_launcher.profile import ClusterProfile
from mbit_launcher.queueing import Unknown, settle
from mbit_launcher.render import render, seconds
from mbit_launcher.silence import Patience, Silent
from mbit_launcher.submission import Submission, create, submissions
from mbit_launcher.submit import cancel, submit, sweep

from megatron_bit.config import Config, load_config
from megatron_bit.errors import UserError

pytestmark = pytest.mark.slow

PROFILE = ClusterProfile(nodes=1, ranks_per_node=2)
SILENT = (  # the first eight are what SLURM 22.05 said when its controller was stopped, or killed
    "slurm_load_jobs error: Socket timed out on send/recv operation",
    "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
    "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
    "scancel: error: Kill job error on job id 9: Unable to contact slurm controller (connect failure)",
    "Unexpected message received for job 1",
    "srun: error: Unable to confirm allocation for job 3: Unable to contact slurm controller (connect failure)\n"
    "srun: Check SLURM_JOB_ID environment variable. Expired or invalid job 3",
    "slurm_load_partitions: Socket timed out on send/recv operation",
    "srun: Job 3 step creation temporarily disabled, retrying (Requested nodes are busy)",
    "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
    "squeue: error: slurm_receive_msg: Connection reset by peer",
    "slurm_load_jobs error: Unable to contact slurm controller (receive failure)",
    "slurm_load_jobs error: Slurm backup controller in standby mode",
    "squeue: error: Connection refused",
    "sbatch: error: Batch job submission failed: Resource temporarily unavailable",
)
REFUSED = (
    "slurm_load_jobs error: Invalid job id specified",
    "scancel: error: Kill job error on job id 9: Access/permission denied",
    "sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
    "sbatch: fatal: Unable to process configuration file",
    "Requested operation is presently disabled for job 1",
    "Job is pending execution for job 1",
    "srun: error: n2: task 1: Exited with exit code 1",
    "",
)


@pytest.mark.parametrize("said", [*SILENT, *REFUSED])
def test_silence_and_refusal(said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Python and the job's grep agree."""
    _programs(tmp_path / "bin", monkeypatch, squeue=f"echo '{said}' >&2; exit 1")
    with pytest.raises(UserError) as error:
        slurm.queued("x")
    assert isinstance(error.value, Silent if said in SILENT else slurm.Refused)
    grep = subprocess.run(["grep", "-qiE", silence.WORDS], input=said, text=True, check=False)
    assert grep.returncode == (0 if said in SILENT else 1)


def _programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    manifests.bare(tmp_path / "data")
    return load_config(None, [f"run={tmp_path / 'run'}", f"data.path={tmp_path / 'data'}"], "laptop")


# A controller of files: `silent` is how many questions it still leaves without an answer, `jobs` its queue.
CONTROLLER = """
cd "$(dirname "$0")/.."
left=$(cat silent); (( left )) && echo $(( left - 1 )) >silent
submit() { id=$(( $(wc -l <jobs) + 12 )); echo "$id|${comment#--comment=}|$script $token" >>jobs; }
if [[ $0 == *sbatch ]]; then
    echo "$*" >>asked
    comment=${*: -3:1} script=${*: -2:1} token=${*: -1}
    (( left )) || { submit; echo $id; exit 0; }
    ! [[ -e heard ]] || submit  # though nobody hears of it
fi
(( ! left )) || { echo "${0##*/}: error: Socket timed out on send/recv operation" >&2; exit 1; }
case $0 in
*scancel) sed -i "/^${*: -1}|/d" jobs; echo "${*: -1}" >>cancelled ;;
*squeue) [[ $* == *%k* ]] && cat jobs || sed 's/|.*/|PENDING|1:00|Priority|/' jobs ;;
esac
"""


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    _programs(tmp_path / "bin", monkeypatch, sbatch=CONTROLLER, squeue=CONTROLLER, scancel=CONTROLLER)
    (tmp_path / "silent").write_text("0")
    (tmp_path / "jobs").touch()
    monkeypatch.setattr(queueing, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(silence, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv(silence.VARIABLE, "20")
    return tmp_path


def _queue(controller: Path) -> list[str]:
    return [line.split("|")[0] for line in (controller / "jobs").read_text().splitlines()]


@pytest.mark.parametrize("heard", [True, False])
@pytest.mark.parametrize("silent", [0, 1, 3])
def test_submit_queues_one_job(heard: bool, silent: int, controller: Path, config: Config) -> None:
    (controller / "silent").write_text(str(silent))
    if heard:
        (controller / "heard").touch()
    (done,) = submit(config, PROFILE.model_copy(update={"sbatch": ("--com=my own", "--qos=x")}))
    assert [done.job] == _queue(controller) == ["12"]
    assert "|my own mbit-" in (controller / "jobs").read_text()
    (made,) = submissions(Path(config.run))
    assert made.jobs() == ["12"] and made.unanswered() == [] and made.log_of("12") == made.logs / "job-12.log"
    assert len((controller / "asked").read_text().splitlines()) == (2 if silent and not heard else 1)


def _lose_the_answer(controller: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Submit a job that SLURM queues and says nothing of, nor of anything else from then on; nobody waits for it."""
    monkeypatch.setenv(silence.VARIABLE, "0")
    (controller / "heard").touch()
    (controller / "silent").write_text("99")
    with pytest.raises(Unknown, match=r"sbatch has had no answer \(Socket timed out on send/recv operation\): whether"):
        submit(config, PROFILE)


def test_nobody_knows_and_the_same_command_finds_out(
    controller: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    _lose_the_answer(controller, config, monkeypatch)
    (row,) = status.collect([Path(config.run)])
    assert row.state is None and row.reason.startswith("squeue has had no answer")
    with pytest.raises(Silent, match="none was submitted"):
        submit(config, PROFILE)
    (controller / "silent").write_text("0")
    assert status.collect([Path(config.run)])[0].state == "pending"
    other = config.model_copy(update={"train": config.train.model_copy(update={"steps": 7})})
    (made,) = submissions(Path(config.run))
    assert made.unanswered()
    assert [done.job for done in submit(config, PROFILE)] == ["12"] and not made.unanswered()
    with pytest.raises(UserError, match=r"job 12 of run .* is PENDING"):
        submit(other, PROFILE)  # not what was queued
    assert _queue(controller) == ["12"]


def test_the_job_has_begun_before_the_same_command_comes(
    controller: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    _lose_the_answer(controller, config, monkeypatch)
    (controller / "silent").write_text("0")
    (made,) = submissions(Path(config.run))
    (token,) = made.unanswered()
    attempts.begin(made, "12.0", "12", "n1", token, "12")
    assert [done.job for done in submit(config, PROFILE)] == ["12"]
    with pytest.raises(UserError, match=r"job 12 of run .* is PENDING"):
        submit(config, PROFILE)


def test_it_is_known_not_to_be_queued(controller: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(silence.VARIABLE, "0")
    (controller / "silent").write_text("1")
    with pytest.raises(Silent, match="the job is not queued; submit it again") as error:
        submit(config, PROFILE)
    assert not isinstance(error.value, Unknown)
    assert submit(config, PROFILE)[0].job == "12" and len(submissions(Path(config.run))) == 2


def test_cancel_and_logs(
    controller: Path, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(config.run)
    submit(config, PROFILE)
    monkeypatch.setenv(silence.VARIABLE, "0")
    (controller / "silent").write_text("2")
    for now, said in ((True, "is known to have ended; call it again"), (False, "STOP is there now")):
        with pytest.raises(Silent, match=said):
            cancel(run, now, Patience())
        assert (run / "STOP").exists() is not now
    assert cancel(run, False, Patience()) == f"{run}: cancelled 12"
    assert (controller / "cancelled").read_text() == "12\n" and _queue(controller) == []
    monkeypatch.setattr(logs, "_POLL_SECONDS", 0.0)
    (controller / "silent").write_text("3")
    assert logs.main([run], follow=True, lines=9, attempt=None) == 0
    said = "squeue has had no answer (Socket timed out on send/recv operation): following on\n"
    assert capsys.readouterr().err == said and (controller / "silent").read_text() == "0\n"


def test_a_killed_submit_leaves_a_job_that_is_found(
    controller: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*words: str) -> str:
        subprocess.run(["sbatch", *words[1:]], check=True, capture_output=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(slurm, "call", killed)
        with pytest.raises(KeyboardInterrupt):
            submit(config, PROFILE)
    assert submit(config, PROFILE)[0].job == "12" and _queue(controller) == ["12"]


def test_a_chain_of_which_a_part_is_queued(controller: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = slurm.sbatch

    def second_refused(script: Path, token: str, *options: str) -> str:
        if any(option.startswith("--dependency") for option in options):
            raise slurm.Refused("sbatch refused: no", "no")
        return plain(script, token, *options)

    monkeypatch.setattr(slurm, "sbatch", second_refused)
    with pytest.raises(UserError, match=r"of the chain of .*run job 12 is queued, and no more: sbatch refused: no"):
        submit(config, PROFILE, 3)


def test_a_sweep_whose_answer_got_lost(controller: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [config.model_copy(update={"run": f"{config.run}/{name}"}) for name in "ab"]
    monkeypatch.setenv(silence.VARIABLE, "0")
    (controller / "heard").touch()
    (controller / "silent").write_text("9")
    with pytest.raises(Unknown):
        sweep(configs, PROFILE)
    (controller / "silent").write_text("0")
    for task, one in enumerate(configs):
        (made,) = submissions(Path(one.run))
        assert settle(made) == made.jobs() == [f"12_{task}"]
        assert made.log_of(f"12_{task}") == submissions(Path(configs[0].run))[0].logs / f"job-12_{task}.log"


def _made(config: Config) -> Submission:
    made = create(config, PROFILE)
    made.ask_job("mbit-0123456789abcdef", made.logs)
    return made


def test_a_job_says_who_it_is(config: Config) -> None:
    made = _made(config)
    assert attempts.begin(made, "12.0", "12", "n1", "mbit-0123456789abcdef", "12") == attempts.OVER
    assert made.jobs() == ["12"] and not made.unanswered()
    assert made.untold()
    assert made.add_job("mbit-0123456789abcdef", "12") == "12" and made.jobs() == ["12"]  # by `submit`, later
    assert not made.untold()
    stray = ("13.0", "13", "n1", "mbit-0123456789abcdef", "13")
    assert attempts.begin(made, *stray) == attempts.NOTHING_TO_DO and made.jobs() == ["12"]


def test_a_job_that_comes_when_nobody_waits_for_it(config: Config) -> None:
    made, words = _made(config), ("12.0", "12", "n1", "mbit-0123456789abcdef", "12")
    made.drop_job("mbit-0123456789abcdef", "not queued")
    create(config, PROFILE)  # it was submitted again
    assert attempts.begin(made, *words) == attempts.NOTHING_TO_DO and not made.jobs()
    (made.folder.parent / "0001" / "config.yaml").unlink()
    assert attempts.begin(made, *words) == attempts.OVER and made.jobs() == ["12"]


def test_patience(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def never() -> None:
        raise Silent("squeue has had no answer (x)")

    monkeypatch.setenv(silence.VARIABLE, "0.5")
    monkeypatch.setattr(silence, "FIRST_PAUSE_SECONDS", 0.01)
    patience, begin = Patience(), time.monotonic()
    with pytest.raises(Silent):
        patience.ask(never)
    assert 0.5 <= time.monotonic() - begin < 2
    with pytest.raises(Silent):  # all questions of a command together
        patience.ask(never)
    assert time.monotonic() - begin < 2
    assert capsys.readouterr().err == "squeue has had no answer (x): asking again for up to 0.5 s\n"
    for bad in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv(silence.VARIABLE, bad)
        with pytest.raises(UserError, match=f"MBIT_SLURM_PATIENCE = '{bad}' has to be a number of seconds"):
            Patience()


LIMITS = {"90": 5400, "2:30": 150, "1:00:30": 3630, "2-0": 172800, "1-2:30": 95400, "1-00:00:10": 86410}


@pytest.mark.parametrize("limit", LIMITS)
def test_time_limits(limit: str) -> None:
    assert seconds(limit) == LIMITS[limit]


# The job's script, with programs that play SLURM and the launcher. Each writes down that it was called.
PLAYED = {
    "python": 'case "$3" in end) echo "$@" >>ended; exit 85 ;; esac; [[ $2 != *watch ]] || exec sleep 60',
    "squeue": "answer squeue",
    "srun": "echo $* >>sruns; answer srun",
    "scontrol": '[[ $1 != show ]] || { echo n1; exit; }; echo "$*" >>scontrols; answer scontrol',
}
ANSWER = """
cd "$(dirname "$0")/.."
answer() {  # the next line of the file of its name: an exit code, and what is said; the last one for ever
    line=$(head -n 1 "$1"); [[ $(wc -l <"$1") == 1 ]] || sed -i 1d "$1"
    [[ $line == 0* ]] || echo "${line#* }" >&2
    [[ $line != 0* ]] || echo "${line#* }"
    exit "${line%% *}"
}
"""
RUNS, TIMED_OUT = "0 RUNNING 0", "1 slurm_load_jobs error: Socket timed out on send/recv operation"
LOST = "1 Unexpected message received for job 9"
NO_STEP = "1 srun: error: Unable to confirm allocation for job 9: Socket timed out on send/recv operation"
JOBS = {
    "all is well": ([RUNS], ["0"], ["0"], 0, 1, "RUNNING"),
    "squeue is silent": ([TIMED_OUT, TIMED_OUT, RUNS], ["0"], ["0"], 0, 1, "RUNNING"),
    "the job is gone": (["1 slurm_load_jobs error: Invalid job id specified"], ["0"], ["0"], 1, 0, ""),
    "requeued by SLURM itself": (["0 COMPLETING 0"], ["0"], ["0"], 1, 0, "COMPLETING"),
    "squeue refuses for ever": (["1 squeue: error: no such cluster"], ["0"], ["0"], 0, 1, "RUNNING"),
    "requeue is silent, and done": ([RUNS, "0 PENDING 1"], [LOST], ["0"], 0, 1, "RUNNING"),
    "and it runs again elsewhere": ([RUNS, "0 RUNNING 1"], [LOST], ["0"], 0, 1, "RUNNING"),
    "requeue is silent, and not done": ([RUNS], [LOST, "0"], ["0"], 0, 2, "RUNNING"),
    "requeue is silent, then refused for it is done": (
        [RUNS, RUNS, "0 PENDING 0"],
        [LOST, "1 Job is pending execution for job 9"],
        ["0"],
        0,
        2,
        "RUNNING",
    ),
    "requeue is refused": ([RUNS], ["1 Requested operation is presently disabled for job 9"], ["0"], 1, 1, "RUNNING"),
    "nodes are busy for a new controller": (
        [RUNS],
        ["0"],
        ["1 srun: error: Unable to create step for job 9: Requested nodes are busy", "0"],
        0,
        1,
        "RUNNING",
    ),
    "the step cannot be started": ([RUNS], ["0"], [NO_STEP, "0"], 0, 1, "RUNNING"),
    "a node is silent": (
        [RUNS],
        ["0"],
        ["1 srun: error: Task launch for StepId=9.0 failed on node n1: Socket timed out on send/recv operation"],
        0,
        1,
        "RUNNING",
    ),
}


def _script(
    root: Path, config: Config, monkeypatch: pytest.MonkeyPatch, **answers: list[str]
) -> tuple[list[str], Path]:
    """Its words, and the folder of its attempt's logs."""
    _programs(root / "bin", monkeypatch, **{name: ANSWER + text for name, text in PLAYED.items()})
    for name, lines in answers.items():
        (root / name).write_text("".join(f"{line}\n" for line in lines))
    made = _made(config)
    profile = PROFILE.model_copy(update={"python": str(root / "bin" / "python"), "preflight": _no_preflight()})
    (root / "job").write_text(render(profile, [made], made.logs / "job-%j.log", []))
    for name, value in {"JOB_ID": "9", "JOB_NODELIST": "n1", "NNODES": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    return ["bash", str(root / "job"), "mbit-0123456789abcdef"], made.logs / "9.0"


def _no_preflight():
    return PROFILE.preflight.model_copy(update={"enabled": False})


@pytest.mark.parametrize("name", JOBS)
def test_job(name: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue, requeue, srun, code, requeues, state = JOBS[name]
    words, logs = _script(tmp_path, config, monkeypatch, squeue=squeue, scontrol=requeue, srun=srun)
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    asked = (tmp_path / "scontrols").read_text().splitlines() if requeues else []
    assert asked == ["requeue 9"] * requeues and (requeues or not (tmp_path / "scontrols").exists())
    assert (tmp_path / "ended").read_text().endswith(f" {srun[-1].split()[0]} {state} 0\n")
    assert len((tmp_path / "sruns").read_text().splitlines()) == len(srun)
    silences = LOST in requeue or TIMED_OUT in squeue or "create step" in srun[0] or NO_STEP in srun
    assert said.count("SLURM does not answer (") == said.count("SLURM answers again") == int(silences), said
    assert ("this cluster does not requeue jobs: use `megatron-bit chain`" in said) == (name == "requeue is refused")
    assert ("squeue cannot be asked here" in said) == (name == "squeue refuses for ever")
    assert not list(logs.glob(".said-*"))


# Helpers that begin a child at once, as the watchdog does, and are ended before, while and after they do.
BEGUN_AND_ENDED = """
child() { "$0"; }
for (( n = 0; n < 30; n++ )); do
    helper child
    (( n % 3 )) && for (( i = 0; i < 40 * (n % 50); i++ )); do :; done
    end_helper $!
done
true
"""


def test_a_helper_leaves_nothing_behind(tmp_path: Path) -> None:
    """What is left would hold the job's output open."""
    text = Path(render.__code__.co_filename).with_name("job.sh").read_text()
    functions = text[text.index("helper() {") : text.index("# If the ranks hang")]
    child = tmp_path / "child"
    child.write_text("#!/bin/bash\nexec sleep 60\n")
    child.chmod(0o755)
    script = f"trap : TERM USR1\n{functions}{BEGUN_AND_ENDED}"
    # `run` waits for whoever holds the pipe
    done = subprocess.run(["bash", "-uc", script, str(child)], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_in_a_container_the_launcher_itself_has_to_wait(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There every call of it is a step, which the controller has to create."""
    words, _ = _script(tmp_path, config, monkeypatch, squeue=[RUNS], scontrol=["0"], srun=[NO_STEP, "0"])
    script = (tmp_path / "job").read_text()
    (tmp_path / "job").write_text(script.replace("\ncontainer=()\n", "\ncontainer=(--container-image=x)\n"))
    srun = """
read -r line <srun
[[ $* == *--overlap* && $line == 0* ]] || answer srun
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
    _programs(tmp_path / "bin", monkeypatch, srun=ANSWER + srun)
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and (tmp_path / "ended").read_text().endswith(" 0 RUNNING 0\n"), (
        done.stdout + done.stderr
    )
    assert done.stdout.count("SLURM does not answer (srun: error: Unable to confirm") == 1


def test_a_signal_in_the_silence(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to stop before its step could be started, the job starts none, and goes back into the queue."""
    words, _ = _script(tmp_path, config, monkeypatch, squeue=[RUNS], scontrol=["0"], srun=[NO_STEP])
    job = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    for line in job.stdout:
        if "SLURM does not answer" in line:
            break
    os.kill(job.pid, signal.SIGUSR1)
    assert job.wait(timeout=20) == 0
    job.stdout.close()
    assert (tmp_path / "ended").read_text().split()[-1] == "1"  # asked
    assert (tmp_path / "scontrols").read_text() == "requeue 9\n"


def test_the_record_of_a_job(config: Config) -> None:
    made = _made(config)
    assert made.unanswered() == ["mbit-0123456789abcdef"] and made.jobs() == []
    with open(made.folder / "jobs.jsonl", "a") as file:
        file.write('{"time": 1}\n')
    with pytest.raises(UserError, match="names a job 'None'"):
        made.jobs()
