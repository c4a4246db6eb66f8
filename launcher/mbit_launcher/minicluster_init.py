"""Process 1 of a cluster made by `minicluster.py`: starts its daemons and nodes, and reaps what dies.

    python -m mbit_launcher.minicluster_init DIR NODES

Ends, and with it the namespace, when munged ends. DIR/control holds what it is asked to do: an empty file "crash n2" or
"boot n2", which goes when it is done. The controller is one of these, too: jobs live on while it is away.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

CONTROLLER = "slurmctld"  # stands among the nodes that crash and boot
_CONTROLLER_COMMAND = ("slurmctld", "-D")
# A node is its own PID, mount and UTS namespace. Its first process reaps, or crashed jobs would stay as zombies.
_NODE = """
hostname "$2" && mount --bind "$1/hosts" /etc/hosts || exit 1
slurmd -D -N "$2" &
while :; do wait; [ $? -gt 128 ] || break; done
"""


def main(folder: Path, count: int) -> None:
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    control = folder / "control"
    control.mkdir(exist_ok=True)
    for old in control.iterdir():
        old.unlink()
    munge = [
        f"--{key}={folder}/{value}"
        for key, value in {
            "socket": "munge.socket", "key-file": "munge.key", "log-file": "log/munged.log", "pid-file": "munged.pid",
            "seed-file": "munge.seed",
        }.items()
    ]  # fmt: skip
    # --force: folders like /tmp are writable for others, and the key is of this cluster alone
    munged = _start("munged", "--foreground", "--force", *munge)
    while not (folder / "munge.socket").exists():
        time.sleep(0.02)
    # -c: of an earlier cluster of this folder it remembers nothing
    nodes = {CONTROLLER: _start(*_CONTROLLER_COMMAND, "-c")}
    nodes |= {name: _boot(folder, name) for name in (f"n{i}" for i in range(1, count + 1))}
    while True:
        for request in control.iterdir():
            what, _, name = request.name.partition(" ")
            if what == "crash" and nodes[name]:
                os.kill(nodes[name], signal.SIGKILL)
            elif what == "boot" and not nodes[name]:
                nodes[name] = _boot(folder, name)
            request.unlink()
        pid, _ = os.waitpid(-1, os.WNOHANG)
        if pid == munged:
            sys.exit(f"munged has ended; see {folder / 'log'}")
        nodes = {name: 0 if pid == process else process for name, process in nodes.items()}  # 0: not running
        if not pid:
            time.sleep(0.05)


def _boot(folder: Path, node: str) -> int:
    """Start a node, or the controller with the jobs that it had; the process id of what keeps it alive."""
    if node == CONTROLLER:
        return _start(*_CONTROLLER_COMMAND)
    namespaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
    return _start(*namespaces, "bash", "-c", _NODE, "node", str(folder), node)


def _start(*command: str) -> int:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True).pid


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
