"""Run many `megatron-bit` commands for the price of one import: imports torch once, then forks for every rank.

    python zygote.py CASES.json FOLDER

CASES.json is a list of {"args": [...], "ranks": n, "env": {...}, "cwd": [one folder a rank]}. What rank r of case i
writes goes to FOLDER/i-r.out and .err; the exit codes of all ranks are printed, a JSON list a case. A case that takes
longer than its "timeout" is killed, and its ranks have the code "hangs".
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")


def main() -> None:
    import torch

    from megatron_bit.optim import zero
    from megatron_bit.parallel import mcore

    zero._import_deepspeed()
    mcore.prepare()
    for module in ("training.job", "inference.generate", "inference.convert"):
        importlib.import_module(f"megatron_bit.{module}")
    torch.set_num_threads(1)
    cases: list[dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text())
    for number, case in enumerate(cases):
        print(json.dumps(_run(number, case, Path(sys.argv[2]))), flush=True)


def _run(number: int, case: dict[str, Any], folder: Path) -> list[int | str]:
    world = case.get("ranks", 1)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            if world > 1:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
                os.environ.update({key: str(value) for key, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
            os.environ.update(case.get("env", {}))
            if "cwd" in case:
                os.chdir(case["cwd"][rank])
            for descriptor, name in ((1, "out"), (2, "err")):
                target = os.open(folder / f"{number}-{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
                os.dup2(target, descriptor)
            _enter(case["args"])
        pids.append(pid)
    codes: dict[int, int | str] = {}
    deadline = time.monotonic() + case.get("timeout", 20)
    while len(codes) < world:
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[pid] = "hangs"
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def _enter(args: list[str]) -> None:
    from megatron_bit import cli

    sys.argv = ["megatron-bit", *args]
    code: Any = 1
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
