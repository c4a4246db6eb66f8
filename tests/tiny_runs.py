"""Tiny but complete runs of the product, for tests that compare layouts, resumes and signals."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gloo_ranks import run_ranks
from torch import Tensor

STEPS = 5

# Odd where the layout allows it: 5 layers, blocks of 3, 9 bits, a vocabulary that is no power of two.
SETTINGS = {
    "model.num_layers": 5,
    "model.hidden_size": 48,
    "model.num_heads": 4,
    "model.num_kv_heads": 4,
    "model.ffn_hidden_size": 88,
    "model.block_size": 3,
    "model.bits": 9,
    "model.init_std": 0.08,
    "model.head.num_layers": 1,
    "model.head.hidden_size": 40,
    "model.head.num_heads": 4,
    "model.head.ffn_hidden_size": 56,
    "diffusion.noise_samples": 2,
    "data.seq_length": 36,
    "train.steps": STEPS,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 1,
    "train.precision": "fp32",
    "optim.lr": 3e-3,
    "optim.eps": 1e-5,  # below it, AdamW turns rounding of a zero gradient into a full step
    "optim.warmup_steps": 2,
    "optim.grad_clip": 0.5,  # active, so that a wrong global norm shows in the weights
    "optim.head_lr_scale": 0.7,
    "log.to": [],
    "parallel.timeout_minutes": 1.5,
}


@dataclass(frozen=True)
class Result:
    """What a run left behind."""

    loss: list[float]
    bound: list[float]
    grad_norm: list[float]
    skipped: list[bool]
    weights: dict[str, Tensor]  # fp32 masters by logical name, of the newest checkpoint


def prepare_data(folder: Path) -> None:
    """A data folder of real text (part of the standard library), vocabulary 421."""
    import email
    import json as module

    from mbit_data.prepare import PrepareOptions, prepare

    inputs = tuple(str(Path(m.__file__).parent) for m in (module, email))
    prepare(
        PrepareOptions(
            inputs=inputs, out=folder, vocab_size=421, validation_fraction=0.2, shard_tokens=40_000, workers=1
        ),
        progress=False,
    )


def overrides(run: Path, data: Path, settings: dict[str, Any]) -> list[str]:
    """key=value arguments of a tiny run."""
    tree = {**SETTINGS, **settings, "run": str(run), "data.path": str(data)}
    return [f"{key}={value}" for key, value in tree.items()]


def train(arguments: list[str], everything_visible: bool = True) -> int:
    """Runs in a rank: `megatron-bit train` on these arguments, in this process.

    With zero AdaLN gates and a zero output layer the backbone is invisible to the loss for two steps, and a broken
    layout with it: `everything_visible` draws those weights like all the others.
    """
    from megatron_bit.config import load_config
    from megatron_bit.model import init
    from megatron_bit.training import job

    if everything_visible:
        init._ZEROS = re.compile(r"(?!)")
    torch.set_num_threads(1)
    return job.main(load_config(None, arguments))


def train_fp32_around(arguments: list[str]) -> int:
    """Runs in a rank: like `train`, with float32 where the precision would have bf16, so that layouts agree closely."""
    from megatron_bit.config import Config

    Config.bf16 = property(lambda self: False)  # type: ignore[assignment,method-assign]
    return train(arguments)


def train_file(file: Path | None, arguments: list[str]) -> int:
    """Runs in a rank: `megatron-bit train FILE key=value ...`, as it is."""
    from megatron_bit.config import load_config
    from megatron_bit.training import job

    torch.set_num_threads(1)
    return job.main(load_config(file, arguments))


def read(run: Path) -> Result:
    """Log and newest checkpoint of a run."""
    from megatron_bit.run.folder import newest_checkpoint

    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return Result(
        loss=[r["loss"] for r in records],
        bound=[r["nats_per_token_bound"] for r in records],
        grad_norm=[r["grad_norm"] for r in records],
        skipped=[r["skipped"] for r in records],
        weights=read_state(newest_checkpoint(run), "param"),
    )


def read_state(checkpoint: Path, state: str) -> dict[str, Tensor]:
    """One state of every logical tensor that has it, whole."""
    from megatron_bit.checkpoint.index import Reader, Rectangle

    index = json.loads((checkpoint / "index.json").read_text())
    reader = Reader(checkpoint, index)
    shapes = {name: tuple(entry["shape"]) for name, entry in index.items() if state in entry["states"]}
    return {n: reader.read(n, state, Rectangle((0,) * len(s), s)) for n, s in shapes.items()}


def sums_anew(checkpoint: Path) -> None:
    """As somebody does who changes a file of a checkpoint on purpose: its sums are those of what is there now."""
    path = checkpoint / "hashes.json"
    files = {file.name: file.read_bytes() for file in map(checkpoint.joinpath, json.loads(path.read_text()))}
    sums = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()}
    path.write_text(json.dumps(sums))
    (checkpoint / "COMMITTED").write_text(hashlib.sha256(path.read_bytes()).hexdigest())


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, str]:
    """Largest absolute difference over all tensors, and whose it is."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    return max(((a[name] - b[name]).abs().max().item(), name) for name in a)


BAD_SAMPLE = 4 * 2 + 3  # in the third step: one micro-batch, so one data-parallel rank


def train_spiked(arguments: list[str], factor: float) -> int:
    """Runs in a rank: like `train`, but the loss of BAD_SAMPLE is multiplied by `factor`."""
    from megatron_bit.model import bitlm

    plain = bitlm.BitLM.loss

    def loss(self: Any, hidden: Any, batch: Any) -> Any:
        output = plain(self, hidden, batch)
        scale = torch.where((batch.sample == BAD_SAMPLE).any(), factor, 1.0)
        return type(output)(output.loss * scale, output.metrics * scale)

    bitlm.BitLM.loss = loss  # type: ignore[method-assign]
    return train(arguments)


def train_beyond_the_bad_step(
    function: Callable[..., int], world: int, run: Path, data: Path, settings: dict[str, Any], *more: float
) -> None:
    """Train to the step of BAD_SAMPLE, whose update is skipped, and on from there, with a checkpoint of every step.

    Saves wait while updates are skipped; but a start saves its last step, whatever that is.
    """
    for steps in (3, 5):
        these = {**settings, "train.steps": steps, "checkpoint.every": 1, "checkpoint.keep": 9}
        run_ranks(function, world, overrides(run, data, these), *more)


def train_poisoned(arguments: list[str], first: int, last: int) -> int:
    """Runs in a rank: like `train`, but samples first ... last - 1 have no finite loss."""
    from megatron_bit.model import bitlm

    plain = bitlm.BitLM.loss

    def loss(self: Any, hidden: Any, batch: Any) -> Any:
        output = plain(self, hidden, batch)
        bad = ((batch.sample >= first) & (batch.sample < last)).any()
        scale = torch.where(bad, float("nan"), 1.0)
        return type(output)(output.loss * scale, output.metrics * scale)

    bitlm.BitLM.loss = loss  # type: ignore[method-assign]
    return train(arguments)


def train_poisoned_killed(arguments: list[str], first: int, last: int, when: str, rewind: int) -> int:
    """Runs in a rank: like `train_poisoned`, but all ranks are killed at the n-th rewind of this start.

    when: "noted" (rank 0 has written it down), "back" (all have loaded the checkpoint), or a number of steps later.
    """
    import os
    import signal

    from megatron_bit.run import rewind as module
    from megatron_bit.training.trainer import Trainer

    plain_write, plain_begin, plain_step = module.write, Trainer.begin_again, Trainer.train_step
    rewinds, steps = [0], [-1]

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write(*args: Any) -> None:
        plain_write(*args)
        rewinds[0] += 1
        if when == "noted" and rewinds[0] == rewind:
            die()

    def begin(self: Trainer, state: Any) -> None:
        plain_begin(self, state)
        if rewinds[0] != rewind and int(os.environ["RANK"]) == 0:
            return
        if when == "back":
            die()
        steps[0] = 0

    def step(self: Trainer, batch: Any) -> None:
        if str(steps[0]) == when:
            die()
        plain_step(self, batch)
        steps[0] += steps[0] >= 0

    module.write = write
    Trainer.begin_again, Trainer.train_step = begin, step  # type: ignore[method-assign]
    return train_poisoned(arguments, first, last)


def train_guarded(arguments: list[str]) -> int:
    """Runs in a rank: a spike of 100 times the loss, and a guard that trusts its mean after two steps."""
    from megatron_bit.optim import guard

    guard.WARM_UP = 2
    return train_spiked(arguments, 100.0)


def train_stalled(arguments: list[str], victim: int) -> int:
    """Runs in a rank: the disk under rank `victim`'s part of step 2 does not answer until step 4 is being saved, longer
    than the writer's patience, and then goes on."""
    from megatron_bit.checkpoint import writer

    plain, begin, back = writer.write_rank, writer.CheckpointWriter.__init__, threading.Event()

    def slow(folder: Path, rank: int, part: Any) -> None:
        if rank == victim and folder.name.startswith("step-00000002."):
            assert back.wait(60)
        plain(folder, rank, part)
        if rank == victim and folder.name.startswith("step-00000004."):
            back.set()

    def impatient(self: Any, root: Path, keep: int, keep_every: int, patience: float, *more: Any) -> None:
        begin(self, root, keep, keep_every, 1.0, *more)

    writer.write_rank, writer.CheckpointWriter.__init__ = slow, impatient  # type: ignore[method-assign]
    code = train(arguments)
    for thread in threading.enumerate():
        if thread.name == "checkpoint-2":
            thread.join(60)
    return code


def train_killed(arguments: list[str], victims: str, operation: int) -> int:
    """Runs in a rank: SIGKILL at the n-th call that changes the disk (sync, rename, delete), here or everywhere.

    Args:
        victims: "0" or "1": that rank dies at its own n-th call. "all": rank 0's n-th call takes every rank down.
    """
    import os
    import signal

    rank, run = int(os.environ["RANK"]), Path(next(a for a in arguments if a.startswith("run=")).removeprefix("run="))
    pids = run.parent / "pids"
    pids.mkdir(exist_ok=True)
    (pids / str(rank)).write_text(str(os.getpid()))
    count = 0

    def strike() -> None:
        nonlocal count
        count += 1
        if count == operation and victims in (str(rank), "all") and (victims != "all" or rank == 0):
            for other in pids.iterdir() if victims == "all" else ():
                if other.name != str(rank):
                    os.kill(int(other.read_text()), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
        plain = getattr(os, name)

        def patched(*args: Any, _plain: Any = plain, **kwargs: Any) -> Any:
            strike()
            return _plain(*args, **kwargs)

        setattr(os, name, patched)
    return train(arguments)


def train_full_disk(arguments: list[str], saves: tuple[int, ...], rank: int) -> int:
    """Runs in a rank: the given saves (counted from 1) hit a limit on the size of files, on one rank."""
    import os
    import resource

    from megatron_bit.checkpoint import writer

    plain, count = writer.write_rank, 0

    def limited(*args: Any) -> None:
        nonlocal count
        count += 1
        hit = count in saves and int(os.environ["RANK"]) == rank
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if hit else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        try:
            plain(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    writer.write_rank = limited  # type: ignore[assignment]
    return train(arguments)


def aloud(arguments: list[str], heard: Path, name: str = "train", *more: Any) -> int:
    """Runs in a rank: a function of this module, with what rank 0 prints in the file `heard`."""
    import contextlib
    import os

    with open(heard if os.environ["RANK"] == "0" else os.devnull, "w") as file, contextlib.redirect_stdout(file):
        return globals()[name](arguments, *more)


def unheard_after_rank0() -> list[int] | None:
    """Runs in a rank: what `unheard` says where rank 0 has left with the store of the job; None on rank 0."""
    import os

    import torch.distributed as dist

    from megatron_bit.parallel.ending import unheard

    dist.init_process_group("gloo")
    if os.environ["RANK"] == "0":
        return None
    return unheard(RuntimeError("Timed out waiting 12000ms for recv operation to complete"))


def train_elsewhere(arguments: list[str], folders: list[str]) -> int:
    """Runs in a rank: like `train`, in a working folder of its own, as on a node of its own."""
    import os

    os.chdir(folders[int(os.environ["RANK"])])
    return train(arguments)


def train_tensorboard_full(arguments: list[str], heard: Path) -> int:
    """Runs in a rank: like `train`, with no room for tensorboard behind its first records; all that is printed in
    `heard`, also by threads."""
    import errno
    import os

    from tensorboard.summary.writer import record_writer

    plain, count = record_writer.RecordWriter.write, 0

    def full(self: Any, data: bytes) -> None:
        nonlocal count
        count += 1
        if count > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(self, data)

    record_writer.RecordWriter.write = full
    descriptor = os.open(heard, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    return train(arguments)


def train_traced(arguments: list[str], calls: Path) -> int:
    """Runs in a rank: like `train`, with a line in `calls` for every file that is synced or renamed: "fsync NAME"."""
    import os

    sync, rename = os.fsync, os.rename

    def note(text: str) -> None:
        with open(calls, "a") as file:
            file.write(text + "\n")

    def synced(descriptor: int) -> None:
        sync(descriptor)
        note(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")

    def renamed(*args: Any, **kwargs: Any) -> None:
        note(f"rename {Path(args[0]).name}")
        rename(*args, **kwargs)

    os.fsync, os.rename = synced, renamed
    return train(arguments)


def train_asked(arguments: list[str], step: int) -> int:
    """Runs in a rank: like `train`; rank 0 gets SIGTERM in the step before `step`, so that all leave behind it."""
    import os
    import signal

    from megatron_bit.training.trainer import Trainer

    plain = Trainer.train_step

    def asked(self: Trainer, batches: Any) -> None:
        if self.state.step == step - 2 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        plain(self, batches)

    Trainer.train_step = asked  # type: ignore[method-assign]
    return train(arguments)


def train_recorded(arguments: list[str], records: Path, die_at: int | None) -> int:
    """Runs in a rank: like `train`, with a line in `records` for every step begun: its number, sample indices, tokens.

    die_at: SIGKILL to this process when that step begins; the other ranks do the same.
    """
    import os
    import signal

    from megatron_bit.training.trainer import Trainer

    plain = Trainer.train_step

    def step(self: Trainer, batches: Any) -> None:
        if self.state.step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        rows = [[b.sample.tolist(), b.tokens.tolist()] for b in batches]
        with open(records, "a") as file:  # one short write each: lines of several ranks do not mix
            file.write(json.dumps([self.state.step, rows]) + "\n")
        plain(self, batches)

    Trainer.train_step = step  # type: ignore[method-assign]
    return train(arguments)


def train_exhausted(arguments: list[str], victim: int, where: str, what: str, said: Path) -> None:
    """Runs in a rank, and ends it: the command `train`, in which rank `victim` runs out of something. What it writes to
    stderr is added to the file `said`.

    Args:
        where: "init" (before ranks have met), "groups" (while the others make theirs), "step", "validation", "save"
            (in the thread that writes), "snapshot" (of the main thread), "data".
        what: "memory", "allocator", "threads", "descriptors" or "address space".
    """
    import os

    from megatron_bit.parallel import ending

    if int(os.environ["RANK"]) == victim:
        _exhaust(where, what)
    if where == "groups":
        ending.GRACE_SECONDS = 3.0
    command(arguments, said)


def command(arguments: list[str], said: Path) -> None:
    """Runs in a rank, and ends it: `megatron-bit train`; what it writes to stderr is added to the file `said`."""
    import os
    import sys

    from megatron_bit import cli

    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.argv = ["megatron-bit", "train", *arguments]
    torch.set_num_threads(1)
    cli.main()


FEW = 80  # descriptors: enough to meet the others, too few for groups


def train_limited(arguments: list[str], ranks: list[int], said: Path, limit: int = FEW) -> None:
    """Runs in a rank, and ends it: the command `train`, in which `ranks` may have this many descriptors open."""
    import os
    import resource

    if int(os.environ["RANK"]) in ranks:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    train_exhausted(arguments, -1, "", "", said)


def train_counted(arguments: list[str]) -> tuple[int, int]:
    """Runs in a rank: like `train`; returns how many descriptors were open at most, and the estimate."""
    from megatron_bit.io.exhausted import open_now
    from megatron_bit.parallel import descriptors

    most, estimates, ended = [0], [], threading.Event()
    plain = descriptors.needed

    def look() -> None:
        while not ended.wait(0.001):
            most[0] = max(most[0], open_now())

    def noted(*args: Any) -> int:
        estimates.append(plain(*args))
        return estimates[-1]

    descriptors.needed = noted
    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        assert train(arguments) == 0
    finally:
        ended.set()
        watcher.join()
    return most[0], estimates[-1]


def _exhaust(where: str, what: str) -> None:
    import resource

    from megatron_bit.checkpoint import writer
    from megatron_bit.data import batches
    from megatron_bit.training.callbacks import evaluate
    from megatron_bit.training.trainer import Trainer

    hit = [0]

    def fail(*args: Any, **more: Any) -> None:
        hit[0] += 1
        if what == "memory":
            raise MemoryError
        if what == "allocator":
            torch.empty(1 << 50)
        if what == "descriptors":
            import os

            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, limit))
            open("/etc/hostname").close()
        if what == "address space":
            from pathlib import Path

            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)
            torch.ones(200 << 20, dtype=torch.uint8)
        raise RuntimeError("can't start new thread")

    if where == "init":
        threading.Thread.start = fail  # type: ignore[method-assign]
    elif where == "groups":
        torch.distributed.init_process_group = fail  # type: ignore[assignment]
    elif where == "step":
        plain = Trainer.train_step

        def step(self: Trainer, batch: Any) -> None:
            if self.state.step == 2:
                fail()
            plain(self, batch)

        Trainer.train_step = step  # type: ignore[method-assign]
    elif where == "validation":
        evaluate.EvaluateCallback._sums = fail  # type: ignore[assignment,method-assign]
    elif where == "data":
        batches._BatchMaker._batches = fail  # type: ignore[assignment,method-assign]
    else:
        setattr(writer, {"save": "write_rank", "snapshot": "snapshot"}[where], fail)
