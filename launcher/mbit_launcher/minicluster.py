"""A SLURM cluster of several nodes on this machine: to try the launcher, and for its tests. Linux, as root.

    DIR/slurm.conf, hosts, munge.key    the cluster's own; the machine's SLURM and munge are not touched
    DIR/init.pid                        "PID START-TIME" of the process that all others end with
    DIR/log/                            slurmctld, slurmd of each node, munged

Everything runs below one process in a PID namespace of its own (`minicluster_init.py`): when that one dies, however it
dies, the kernel ends the rest. Each node is a namespace in it, with its own host name, so that a node can crash.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil

from mbit_launcher.local import choose_port
from mbit_launcher.minicluster_init import CONTROLLER
from megatron_bit.errors import UserError
from megatron_bit.io.files import write_atomic

NEEDED = {  # program: package
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "munged": "munge",
    "unshare": "util-linux",
    "pkill": "procps",  # job.sh
}
START_SECONDS = 30
_PR_SET_PDEATHSIG = 1
_LONGEST = 60  # characters of DIR: a socket below it has 108 at most

# Defaults of the real thing are minutes: here a preempted or requeued job is back in seconds.
_CONF = """\
ClusterName=minicluster
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its credential has expired: 120 s by default
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=0,sched_min_interval=0
SwitchType=switch/none
GresTypes=gpu
MpiDefault=none
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PropagateResourceLimits=NONE
ReturnToService=2
EnforcePartLimits=ALL
JobRequeue=1
MailProg=/bin/true
KillWait=5
SlurmdTimeout=5
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""
_NODE = (
    "NodeName=n{i} NodeHostname=n{i} NodeAddr=127.0.1.{i} Port={port} CPUs={cpus} Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=32000 Gres=gpu:{gpus} State=UNKNOWN\n"
)
_PARTITIONS = """\
PartitionName=train Nodes=n[1-{nodes}] MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 Default=YES
PartitionName=high Nodes=n[1-{nodes}] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can be started here, and what to do; None if it can."""
    packages = sorted({package for program, package in NEEDED.items() if _which(program) is None})
    if packages:
        return f"not installed: {', '.join(packages)}; on Debian or Ubuntu: apt-get install {' '.join(packages)}"
    if os.geteuid() != 0:
        return "a cluster on this machine needs root: its nodes are namespaces with host names of their own"
    probe = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "hostname", "n1"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False, timeout=20)
    if done.returncode:
        return (
            f"this machine allows no namespaces ({' '.join(done.stderr.split())}): a container without CAP_SYS_ADMIN?"
        )
    return None


def up(folder: Path, nodes: int = 3, cpus: int = 8, gpus: int = 0, with_parent: bool = False) -> Path:
    """Start a cluster of `nodes` nodes, which pretend to have `cpus` cores and `gpus` GPUs; returns its slurm.conf.

    Args:
        folder: the cluster's own; made if it is not there.
        with_parent: end the cluster when the calling process ends, however it does.

    Raises:
        UserError: it cannot run here, or has not come up within 30 s.
    """
    folder = folder.absolute()
    if reason := missing():
        raise UserError(f"no SLURM cluster can be started here: {reason}")
    if len(str(folder)) > _LONGEST or not re.fullmatch(r"[\w./-]+", str(folder), re.ASCII):
        raise UserError(
            f"{folder} cannot hold a cluster: its path may have {_LONGEST} letters, digits, _ - . at most; use for "
            "example /tmp/cluster"
        )
    if not 1 <= nodes <= 64:
        raise UserError(f"--nodes {nodes} has to be 1 to 64")
    if running(folder):
        raise UserError(f"a cluster runs in {folder}; `megatron-bit cluster down {folder}` ends it")
    for name in ("state", "log", "spool"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _configure(folder, nodes, cpus, gpus)
    command = [
        "unshare", "--pid", "--fork", "--kill-child", "--mount-proc",
        sys.executable, "-P", "-m", "mbit_launcher.minicluster_init", str(folder), str(nodes),
    ]  # fmt: skip
    prctl = ctypes.CDLL(None).prctl  # before the fork: see local.py
    with open(folder / "log" / "init.log", "ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=(lambda: prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)) if with_parent else None,
        )
    write_atomic(folder / "init.pid", f"{process.pid} {psutil.Process(process.pid).create_time()}".encode())
    try:
        _wait_until_idle(folder, nodes, process)
    except BaseException:
        down(folder)
        raise
    return folder / "slurm.conf"


def down(folder: Path) -> bool:
    """End the cluster and everything that runs on it; False if none ran."""
    process = running(folder.absolute())
    if process is None:
        return False
    process.kill()  # unshare --kill-child takes the init with it, and the kernel what lives in its namespace
    process.wait(timeout=10)
    (folder / "init.pid").unlink(missing_ok=True)
    return True


def crash(folder: Path, node: str) -> None:
    """SIGKILL everything on a node, as a power cut would, or the controller. UserError if there is no such node."""
    _ask(folder, "crash", node)


def boot(folder: Path, node: str) -> None:
    """Start a node, or the controller, that has crashed. UserError if there is no such node."""
    _ask(folder, "boot", node)


def _ask(folder: Path, what: str, node: str) -> None:
    nodes = re.findall(r"^NodeName=(\S+)", _conf(folder), re.MULTILINE)
    if running(folder) is None:
        raise UserError(f"no cluster runs in {folder}; `megatron-bit cluster up {folder}` starts one")
    if node not in (*nodes, CONTROLLER):
        raise UserError(f"the cluster in {folder} has no node {node!r}; it has {', '.join(nodes)} and {CONTROLLER}")
    request = folder / "control" / f"{what} {node}"
    request.touch()
    deadline = time.monotonic() + 5
    while request.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def _conf(folder: Path) -> str:
    try:
        return (folder / "slurm.conf").read_text()
    except OSError:
        return ""


def running(folder: Path) -> psutil.Process | None:
    """The process that the cluster of this folder lives and dies with."""
    try:
        pid, born = (folder / "init.pid").read_text().split()
        process = psutil.Process(int(pid))
        alive = process.create_time() == float(born) and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, psutil.Error):
        return None
    return process if alive else None


def _configure(folder: Path, nodes: int, cpus: int, gpus: int) -> None:
    if not (folder / "munge.key").exists():
        descriptor = os.open(folder / "munge.key", os.O_WRONLY | os.O_CREAT, 0o600)
        with open(descriptor, "wb") as file:
            file.write(os.urandom(128))
    ports = _free_ports(nodes + 1)
    conf = _CONF.format(folder=folder, port=ports[0])
    conf += "".join(_NODE.format(i=i, port=ports[i], cpus=cpus, gpus=gpus) for i in range(1, nodes + 1))
    (folder / "slurm.conf").write_text(conf + _PARTITIONS.format(nodes=nodes))
    for gpu in range(gpus):  # SLURM wants device files: these are /dev/null by another name
        if not (folder / f"nvidia{gpu}").exists():
            os.mknod(folder / f"nvidia{gpu}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/nvidia[0-{gpus - 1}]\n" if gpus else "")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    here = Path("/etc/hosts").read_text().rstrip("\n")
    (folder / "hosts").write_text("\n".join([here, *(f"127.0.1.{i} n{i}" for i in range(1, nodes + 1))]) + "\n")


def _free_ports(count: int) -> list[int]:
    """Different TCP ports that no one uses now, on any address of this machine."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(choose_port())
    return list(ports)


def _wait_until_idle(folder: Path, nodes: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    said = ""
    while time.monotonic() < deadline and process.poll() is None:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--partition=train", "--format=%t"],
            env=environment, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        said = done.stderr.strip() or f"nodes are {done.stdout.split()}"
        if done.stdout.split().count("idle") == nodes:
            return
        time.sleep(0.1)
    raise UserError(f"the cluster has not come up in {START_SECONDS} s ({said}); see {folder / 'log'}")


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")  # daemons of Debian
