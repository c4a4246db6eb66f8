"""What a person sees of a run: the progress line, the JSON-lines log (a record a step) and the trackers."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_bit.errors import UserError
from megatron_bit.io import console
from megatron_bit.io.measured import json_of
from megatron_bit.parallel.agree import on_rank0
from megatron_bit.parallel.ending import alone
from megatron_bit.parallel.split import train_flops
from megatron_bit.planning.hardware import peak_flops
from megatron_bit.run.folder import RUN_ID
from megatron_bit.training.trackers.tracker import About, shareable
from megatron_bit.training.trainer import Callback, StepRecord, Trainer

_SHOWN = ("loss", "nats_per_token_bound", "lr", "grad_norm", "tokens_per_second")  # of a record, to the trackers


class MetricsCallback(Callback):
    """Keeps the records of a log interval on the device and reads them together, so that no step waits."""

    def start(self, trainer: Trainer) -> None:
        self._records: list[tuple[StepRecord, float]] = []
        self._log: Any = None
        self._tty, self._said_lost = sys.stdout.isatty(), False
        self._peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self._begin = self._last = time.perf_counter()
        self._first_step = trainer.state.step
        on_rank0(lambda: self._open(trainer))

    def _open(self, trainer: Trainer) -> None:
        try:
            self._log = open(trainer.run / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115
            config, state = trainer.config, trainer.state
            shown = shareable(config.model_dump(mode="json"))
            about = About(trainer.run, trainer.identity[RUN_ID], shown, state.step, state.tokens)
            trainer.trackers.open(config.log, about)
        except OSError as error:
            raise UserError(f"log {error.filename or trainer.run} cannot be written: {error.strerror}") from None

    def after_step(self, trainer: Trainer) -> None:
        assert trainer.record is not None
        now = time.perf_counter()
        self._records.append((trainer.record, now - self._last))
        self._last = now
        config, step = trainer.config, trainer.state.step
        # before every save too: a run that dies later goes on from there, and its log is to have no gap
        if trainer.stopping or step % config.log.every == 0 or step % config.checkpoint.every == 0:
            self._flush(trainer)

    def finish(self, trainer: Trainer) -> None:
        with contextlib.suppress(OSError):  # a full disk has been said, and a full buffer would say it once more
            if self._log is not None:
                self._log.close()
        if trainer.groups.rank == 0:
            trainer.trackers.close(trainer.state.step >= trainer.config.train.steps)

    def _flush(self, trainer: Trainer) -> None:
        records, self._records = self._records, []
        lost = trainer.groups.rank == 0 and bool(trainer.lock.lost())
        told = torch.tensor([_memory_bytes(), lost], dtype=torch.float64, device=trainer.groups.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        trainer.settle()
        memory, orphaned = told.tolist()
        trainer.orphaned = bool(orphaned)
        if trainer.groups.rank != 0:
            return
        per_step = trainer.config.train.global_batch_size * trainer.config.data.seq_length
        lines = []
        for record, seconds in records:
            loss, bound = record.totals[:2].tolist()
            lines.append(
                {
                    "step": record.step,
                    "tokens": record.tokens,
                    "loss": loss,
                    "nats_per_token_bound": bound,
                    "lr": record.lr,
                    "grad_norm": float(record.grad_norm),
                    "skipped": bool(record.skipped),
                    "replaced": record.replaced,
                    "seconds": round(seconds, 6),
                    "tokens_per_second": round(per_step / seconds, 1),
                }
            )
        for line in lines if trainer.state.rewinds else ():
            line["rewinds"] = trainer.state.rewinds
        if console.lost() and not self._said_lost:
            self._said_lost = True
            lines[-1]["console"] = f"lost: {console.lost()}"
        try:
            self._log.writelines(json_of(line) + "\n" for line in lines)
            self._log.flush()
        except OSError as error:
            raise alone(UserError(f"{trainer.run / 'log.jsonl'} cannot be written: {error.strerror}")) from None
        rate = per_step * len(lines) / sum(line["seconds"] for line in lines)
        mfu = self._mfu(trainer, rate)
        self._show(trainer, lines, mfu, memory)
        self._print(trainer, lines, rate, mfu, memory)

    def _mfu(self, trainer: Trainer, rate: float) -> float | None:
        """Of all ranks at so many tokens a second; None where the device's peak is not known."""
        if self._peak is None:
            return None
        return rate * train_flops(trainer.config) / (self._peak * trainer.groups.dims.world_size)

    def _show(self, trainer: Trainer, lines: list[dict[str, Any]], mfu: float | None, memory: float) -> None:
        """The same for the trackers, and with the last line what is of all of them."""
        state = trainer.state
        now: dict[str, float] = {"skipped": state.skipped, "replaced": state.replaced, "memory_gib": memory / 2**30}
        now |= {} if mfu is None else {"mfu": mfu}
        for line in lines:
            values = {key: line[key] for key in _SHOWN} | (now if line is lines[-1] else {})
            trainer.trackers.scalars("train", line["step"], line["tokens"], values)
        trainer.trackers.flush()

    def _print(
        self, trainer: Trainer, lines: list[dict[str, Any]], rate: float, mfu: float | None, memory: float
    ) -> None:
        def mean(key: str) -> float:
            return sum(line[key] for line in lines) / len(lines)

        config, state = trainer.config, trainer.state
        share = "n/a" if mfu is None else f"{100 * mfu:.1f} %"
        share += " on CPU" if trainer.groups.device.type == "cpu" else ""
        loss = f"loss {mean('loss'):.4f}"
        if config.loss_is_exact:  # a second time would be the same number
            loss += " nats/token"
        else:
            loss += f"  {'exact' if config.exact else 'bound'} {mean('nats_per_token_bound'):.3f} nats/token"
        # the pace of this whole start, which contains saves and validation
        pace = (time.perf_counter() - self._begin) / max(1, state.step - self._first_step)
        eta = _duration(pace * (trainer.last_step - state.step))
        skipped = f"  skipped {state.skipped}" if state.skipped else ""
        skipped += f"  replaced {state.replaced}" if state.replaced else ""
        skipped += f"  rewinds {state.rewinds}" if state.rewinds else ""
        text = (
            f"step {state.step}/{config.train.steps}  {loss}  {_count(rate)} tokens/s  MFU {share}  "
            f"grad norm {lines[-1]['grad_norm']:.3f}  lr {lines[-1]['lr']:.2e}  "
            f"memory {memory / 2**30:.2f} GiB  ETA {eta}{skipped}"
        )
        if self._tty and not trainer.stopping:
            print(f"\r\x1b[K{text}", end="", flush=True)
        else:
            print(f"\r\x1b[K{text}" if self._tty else text, flush=True)


def _memory_bytes() -> float:
    """Peak device memory of this rank, or its resident memory on a CPU."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return float(psutil.Process().memory_info().rss)


def _count(value: float) -> str:
    for unit in ("", "k", "M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
