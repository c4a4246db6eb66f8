"""The local launcher with real processes; the ranks are small scripts without torch."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mbit_launcher import local

from megatron_bit.errors import UserError

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]

# A rank that reports its pid, then does what the scenario says. On SIGTERM and SIGUSR1 it "saves": exit 85.
RANK = """
import json, os, signal, sys, time
folder, rank = sys.argv[1], int(os.environ["RANK"])
def save(number, frame):
    with open(f"{folder}/signals-{rank}", "a") as file:
        file.write(f"{number}\\n")
    sys.exit(85)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
with open(f"{folder}/new-{rank}", "w") as file:
    json.dump({"pid": os.getpid(), "session": os.getsid(0), "env": dict(os.environ)}, file)
os.rename(f"{folder}/new-{rank}", f"{folder}/rank-{rank}")
def started(n):
    return all(os.path.exists(f"{folder}/rank-{r}") for r in range(n))
while not started(int(os.environ["WORLD_SIZE"])):
    time.sleep(0.01)
"""
# The parent as a process of its own, so that it can get signals: parent.py RANK_SCRIPT FOLDER NPROC GRACE
PARENT = """
import sys
from mbit_launcher.local import run_local
script, folder, nproc, grace = sys.argv[1:]
sys.exit(run_local([folder], int(nproc), grace_seconds=float(grace), command=[sys.executable, script]))
"""


def rank_script(folder: Path, body: str) -> list[str]:
    path = folder / "rank.py"
    path.write_text(RANK + body)
    return [sys.executable, str(path)]


def start_parent(folder: Path, body: str, nproc: int = 2, grace: float = 5) -> subprocess.Popen[str]:
    """A launcher whose ranks have all started."""
    script = rank_script(folder, body)[1]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, script, str(folder), str(nproc), str(grace)],
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: all((folder / f"rank-{r}").exists() for r in range(nproc)))
    return parent


def pids(folder: Path) -> list[int]:
    return [json.loads(p.read_text())["pid"] for p in sorted(folder.glob("rank-*"))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def test_success_and_the_ranks_environment(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert local.run_local([str(tmp_path)], 3, command=rank_script(tmp_path, "")) == 0
    reports = [json.loads((tmp_path / f"rank-{r}").read_text()) for r in range(3)]
    for rank, report in enumerate(reports):
        env = report["env"]
        assert (env["RANK"], env["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("3", "3")
        assert (env["MASTER_ADDR"], env["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")
        assert env["OMP_NUM_THREADS"] == "7"  # what the user has set stays
        assert report["session"] == report["pid"]
    assert len({r["env"]["MASTER_PORT"] for r in reports}) == 1
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_env_replaces_the_environment_and_threads_share_the_cores(tmp_path: Path) -> None:
    port = local.choose_port()
    env = {"PATH": os.environ["PATH"], "GLOO_SOCKET_IFNAME": "eth7"}
    command = rank_script(tmp_path, "")
    assert local.run_local([str(tmp_path)], 2, port=port, env=env, command=command) == 0
    seen = json.loads((tmp_path / "rank-0").read_text())["env"]
    assert seen["MASTER_PORT"] == str(port)
    assert seen["GLOO_SOCKET_IFNAME"] == "eth7"
    assert seen["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert "HOME" not in seen


def test_a_failing_rank_ends_the_others_and_is_named(tmp_path: Path, capfd: Capture) -> None:
    body = "time.sleep(60 if rank != 1 else 0)\nsys.exit(3)"
    began = time.monotonic()
    code = local.run_local([str(tmp_path)], 3, grace_seconds=0.3, command=rank_script(tmp_path, body))
    assert code == 3
    assert time.monotonic() - began < 10
    assert capfd.readouterr().err == "rank 1 of 3 exited with code 3\n"
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_a_rank_that_ignores_sigterm_and_its_helper_are_killed(tmp_path: Path) -> None:
    body = f"""
import subprocess
if rank == 1:
    sys.exit(4)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
helper = subprocess.Popen([{sys.executable!r}, "-c", "import time; time.sleep(60)"])
open(f"{{folder}}/helper", "w").write(str(helper.pid))
time.sleep(60)
"""
    began = time.monotonic()
    assert local.run_local([str(tmp_path)], 2, grace_seconds=1, command=rank_script(tmp_path, body)) == 4
    assert time.monotonic() - began < 15
    helper = int((tmp_path / "helper").read_text())
    wait_until(lambda: not alive(helper))


def test_a_rank_killed_by_a_signal(tmp_path: Path, capfd: Capture) -> None:
    body = "os.kill(os.getpid(), 11) if rank == 0 else time.sleep(60)"
    command = rank_script(tmp_path, body)
    assert local.run_local([str(tmp_path)], 2, grace_seconds=0.2, command=command) == 128 + 11
    assert capfd.readouterr().err == "rank 0 of 2 was killed by SIGSEGV\n"


def test_exit_2_is_passed_on_in_silence(tmp_path: Path, capfd: Capture) -> None:
    body = "sys.exit(2) if rank == 1 else time.sleep(60)"
    assert local.run_local([str(tmp_path)], 2, grace_seconds=0.2, command=rank_script(tmp_path, body)) == 2
    assert capfd.readouterr().err == ""


def test_85_and_a_rank_that_never_stops_is_a_failure(tmp_path: Path, capfd: Capture) -> None:
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsys.exit(85) if rank == 0 else time.sleep(60)"
    assert local.run_local([str(tmp_path)], 2, grace_seconds=0.2, command=rank_script(tmp_path, body)) == 137
    assert capfd.readouterr().err == "rank 1 of 2 was killed by SIGKILL because it did not stop\n"


@pytest.mark.parametrize(
    ("sent", "received"),
    [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGUSR1"), ("SIGHUP", "SIGTERM"), ("SIGINT", "SIGTERM")],
)
def test_signals_to_the_parent_reach_every_rank(tmp_path: Path, sent: str, received: str) -> None:
    parent = start_parent(tmp_path, "time.sleep(60)")
    parent.send_signal(signal.Signals[sent])
    assert parent.communicate(timeout=10)[1] == (
        "Ctrl-C: the ranks save and stop; again to kill them\n" if sent == "SIGINT" else ""
    )
    assert parent.returncode == 85
    for rank in range(2):
        assert (tmp_path / f"signals-{rank}").read_text() == f"{int(signal.Signals[received])}\n"
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_a_signal_is_forwarded_once_and_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    body = """
def slow(number, frame):
    with open(f"{folder}/slow-{rank}", "a") as file:
        file.write("x")
signal.signal(signal.SIGTERM, slow)
open(f"{folder}/ready-{rank}", "w").close()
while True:
    time.sleep(60)
"""
    parent = start_parent(tmp_path, body)
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        parent.send_signal(number)
        time.sleep(0.2)
    assert all((tmp_path / f"slow-{r}").read_text() == "x" for r in range(2))
    assert parent.poll() is None
    parent.send_signal(signal.SIGINT)
    parent.communicate(timeout=5)
    assert parent.returncode == 137
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_no_rank_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = start_parent(tmp_path, "time.sleep(60)", nproc=3)
    ranks = pids(tmp_path)
    assert all(alive(pid) for pid in ranks)
    parent.kill()
    parent.communicate(timeout=5)
    wait_until(lambda: not any(alive(pid) for pid in ranks), seconds=5)


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"^port {port} is taken by another process") as caught:
            local.run_local([str(tmp_path)], 2, port=port, command=rank_script(tmp_path, ""))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("rank-*"))


# fmt-me
@pytest.mark.parametrize(
    ("nproc", "port", "message"), [(0, None, "nproc = 0"), (1, 70000, "port 70000"), (1, 0, "port 0")]
)
def test_bad_numbers(nproc: int, port: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        local.run_local([], nproc, port=port)


def test_a_command_that_does_not_exist_leaves_nothing(tmp_path: Path) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(FileNotFoundError):
        local.run_local([], 2, command=[str(tmp_path / "nothing")])
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_importing_it_does_not_import_torch() -> None:
    heavy = "{'torch', 'numpy', 'pydantic', 'yaml'}"
    code = f"import sys, mbit_launcher.local; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
