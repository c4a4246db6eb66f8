"""A run that has diverged goes back to a checkpoint, or ends."""

from __future__ import annotations

from pathlib import Path

from megatron_bit.errors import Diverged
from megatron_bit.io.files import write_atomic
from megatron_bit.parallel.agree import on_rank0
from megatron_bit.run import rewind
from megatron_bit.run.checkpoints import newest_until, read_meta
from megatron_bit.run.log import roll_back
from megatron_bit.run.rewind import Rewind
from megatron_bit.training.start import restore
from megatron_bit.training.trainer import Trainer


def on_divergence(trainer: Trainer) -> None:
    """Go back to the newest checkpoint from whose weights a finite loss was computed, and on behind the data that was
    seen since (PaLM, 2204.02311, section 5.1); or raise Diverged, on all ranks."""
    run, state, optim = trainer.run, trainer.state, trainer.config.optim

    def look() -> tuple[Path | None, str]:
        good = newest_until(run / "checkpoints", state.good)
        stop = optim.on_divergence == "stop" or state.rewinds >= optim.max_rewinds or good is None
        said = (
            f"{run} has diverged: up to step {state.step} {trainer.in_row} updates in a row were skipped or had no "
            f"finite loss; the newest checkpoint of before is {good or 'none'}"
        )
        if stop:
            write_atomic(run / "DIVERGED", f"{said}\n".encode())
            return None, said
        assert good is not None
        step = read_meta(good)["step"]
        back = Rewind(step, state.samples, state.rewinds + 1, state.replaced, state.damaged)
        rewind.write(run, back)  # first: a start after this one has died goes on from here too
        aside = list(rewind.set_aside(run, back))
        roll_back(run, step)
        if trainer.mirror is not None:
            trainer.mirror.went_back(back)
        print(f"warning: {said}; going on from there behind sample {state.samples} ({state.rewinds + 1} of "
              f"{optim.max_rewinds} rewinds)", *aside, sep="\n", flush=True)  # fmt: skip
        return good, said

    good, said = on_rank0(look)
    if good is None:
        newer = (
            "remove the newer ones (`megatron-bit checkpoint rm`), lower optim.lr or set optim.grad_clip, and continue"
        )
        raise Diverged(f"{said}; {newer}, or set optim.on_divergence=rewind")
    begun = restore(good, on_rank0(lambda: read_meta(good)), trainer.optimizer, trainer.groups)
    back = on_rank0(lambda: rewind.read(run))
    assert back is not None
    back.catch_up(begun)
    trainer.begin_again(begun)
