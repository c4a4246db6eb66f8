"""The checks of scripts/gpu_check.py, one a process: `python -m megatron_bit.bench.on_device CHECK DEVICE RESULT.json`.

Each returns rows for a table; a row with "right" false is a wrong result. On a CPU they run at small sizes, and what
needs a GPU is a row that says so.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor

from megatron_bit.bench.measuring import milliseconds, relative_error

Row = dict[str, Any]


def environment(device: torch.device) -> list[Row]:
    """What is here."""
    from megatron_bit.precision import te

    rows = [{"what": "python", "found": platform.python_version()}, {"what": "torch", "found": torch.__version__}]
    if device.type == "cuda":
        name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        rows.append({"what": "GPU", "found": f"{name}, compute capability {major}.{minor}, CUDA {torch.version.cuda}"})
    rows += [{"what": f"fp8.recipe={name}", "found": why or "offered"} for name, why in te.offered().items()]
    return rows


def engine(device: torch.device) -> list[Row]:
    """tests/gpu: what precision/te.py asks of Transformer Engine, of the package itself."""
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = ["tests/gpu", "-q", "-p", "no:cacheprovider", "--timeout", "60", "--junitxml", str(report)]
        subprocess.run([sys.executable, "-m", "pytest", *words], cwd=root, check=False)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return [_outcome(case) for case in cases]


def _outcome(case: ElementTree.Element) -> Row:
    """A row of a test; one that was skipped says why."""
    row: Row = {"test": case.get("name") or case.get("classname"), "result": "passed"}
    for kind in ("failure", "error", "skipped"):
        found = case.find(kind)
        if found is not None:
            lines = found.get("message", "").splitlines() or [""]
            row |= {"result": f"{kind}: {lines[0][:120]}", **({} if kind == "skipped" else {"right": False})}
    return row


def attention(device: torch.device) -> list[Row]:
    """The seam under a mask: FlexAttention, and SDPA with a dense mask, against float64; outputs and gradients."""
    from megatron_bit.model.attention import CoreAttention, RotaryEmbedding
    from megatron_bit.model.flex import MaskedAttention

    on_gpu = device.type == "cuda"
    length, dtype = (2048, torch.bfloat16) if on_gpu else (96, torch.float32)
    torch.manual_seed(0)
    tensors = [torch.randn(length, 2, heads, 64, device=device, dtype=dtype) for heads in (8, 2, 2)]
    begins = torch.tensor([0, length // 3 // 4 * 4, length // 2], device=device)
    position = torch.arange(length, device=device)
    start = begins[(position[:, None] >= begins).sum(1) - 1].repeat(2, 1)
    rows = []
    for block, masked in ((4, False), (None, True), (4, True)):
        rope, flex = RotaryEmbedding(1e4), MaskedAttention(block, masked, device)
        dense = CoreAttention(None, rope=rope, block_size=block, masked=masked)
        fast = CoreAttention(None, rope=rope, block_size=block, masked=masked, flex=flex)
        exact = CoreAttention(None, rope=RotaryEmbedding(1e4), block_size=block, masked=masked)
        wanted = _with_gradients(exact, [t.double() for t in tensors], start, gradients=True)
        for name, layer in (("SDPA, dense mask", dense), ("FlexAttention", fast)):
            gradients = on_gpu or layer is dense  # FlexAttention has none on a CPU
            got = _with_gradients(layer, tensors, start, gradients)
            worst = [relative_error(a, b) for a, b in zip(got, wanted, strict=False)]
            row: Row = {"block": block, "documents": masked, "form": name, "out": worst[0]}
            row["gradients"] = max(worst[1:]) if gradients else "none on a CPU"
            row["ms"] = milliseconds(
                functools.partial(_with_gradients, layer, tensors, start, gradients), device, repeats=10, calls=1
            )
            rows.append({**row, "right": max(worst) < (2e-2 if on_gpu else 1e-4)})
    return rows


def fp8(device: torch.device) -> list[Row]:
    """One product, forward and backward, by Transformer Engine and emulated: how far apart, and from float64."""
    from megatron_bit.precision import te
    from megatron_bit.precision.emulated import Quantizer, _Product

    size = 4096 if device.type == "cuda" else 256
    torch.manual_seed(0)
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    w = torch.randn(size, size, device=device, dtype=torch.bfloat16) * 0.02
    g = torch.randn(size, size, device=device, dtype=torch.bfloat16) * 1e-3
    exact = _linear(lambda a: a.double() @ w.double().t(), x, w, g)[:1]
    offered = te.offered() if device.type == "cuda" else dict.fromkeys(("current", "block", "mxfp8"), "no GPU")
    rows = []
    for recipe in ("current", "block", "mxfp8"):  # delayed scaling is current scaling with older scales
        q = Quantizer(recipe, 1, device)
        weight = w.clone().requires_grad_()
        mine = _linear(lambda a: _Product.apply(a, weight, q), x, weight, g)  # noqa: B023
        row: Row = {"recipe": recipe, "emulated to float64": relative_error(mine[0], exact[0])}
        row["right"] = row["emulated to float64"] < 0.05
        if offered[recipe]:
            rows.append({**row, "real": offered[recipe]})
            continue
        layer, state = te.plain_linear(recipe, w)
        own: Any = layer.weight
        with state():
            real = _linear(layer, x, own, g)
        for name, a, b in zip(("out", "input gradient", "weight gradient"), real, mine, strict=True):
            row[f"real to emulated, {name}"] = relative_error(a, b)
            row["right"] = row["right"] and relative_error(a, b) < 0.02
        rows.append(row)
    return rows


def training(device: torch.device) -> list[Row]:
    """The same steps on this device and on the CPU, from the same weights, in fp32; and in the other precisions."""
    from megatron_bit.bench.gpt_peer import with_transformer_engine

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = _data(folder)
        sizes = ["model.hidden_size=128", "model.ffn_hidden_size=256", "model.num_layers=2", "data.seq_length=128",
                 "train.steps=4", "train.global_batch_size=4", "log.every=1", "log.to=[]",
                 "optim.warmup_steps=1", f"data.path={data}"]  # fmt: skip
        _train(folder / "cpu", [*sizes, "train.precision=fp32", "checkpoint.initial=true"], "cpu")
        wanted = _losses(folder / "cpu")
        begin = f"train.init_from={folder / 'cpu' / 'checkpoints' / 'step-00000000'}"
        real = ["fp8"] if device.type == "cuda" and with_transformer_engine() else []
        rows = []
        for precision in ("fp32", "bf16", "fp8_emulated", *real):
            _train(folder / precision, [*sizes, f"train.precision={precision}", begin], device.type)
            got = _losses(folder / precision)
            worst = max(abs(a / b - 1) for a, b in zip(got, wanted, strict=True))
            limit = 2e-3 if precision == "fp32" else 3e-2  # a GPU's fp32 sums are in another order, and AdamW amplifies
            rows.append(
                {"precision": precision, "losses": str(got), "worst to CPU fp32": worst, "right": worst < limit}
            )
        return rows


def waits(device: torch.device) -> list[Row]:
    """What makes the host wait for the device in the third step of a run, as torch's sync debug mode sees it."""
    if device.type != "cuda":
        return [{"what": "needs a GPU; tests/dist/test_host_syncs.py counts on a CPU"}]
    from megatron_bit.config import load_config
    from megatron_bit.training import job
    from megatron_bit.training.trainer import Trainer

    plain, seen = Trainer.train_step, []

    def step(self: Trainer, batches: Any) -> None:
        if self.state.step != 2:
            return plain(self, batches)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                plain(self, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        seen.extend(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
        return None

    Trainer.train_step = step  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as name:
        data = _data(Path(name))
        words = [f"data.path={data}", f"run={name}/run", "train.steps=4", "log.to=[]"]
        job.main(load_config(preset="laptop", overrides=words))
    # the log's values of the step before, whether it was skipped; DeepSpeed is not in it (one rank: ZeRO-0)
    return [{"wait": place, "right": place.startswith("trainer.py")} for place in seen] or [{"wait": "none"}]


def layers(device: torch.device) -> list[Row]:
    """The small layers without a kernel of ours: plain, as used, and plain under torch.compile."""
    from mbit_kernels import rms_norm, swiglu

    rows_of, width = (65536, 2048) if device.type == "cuda" else (256, 128)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

    x, weight, both = tensor(rows_of, width), tensor(width), tensor(rows_of, 2 * width)

    def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-5)

    cases: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "RMSNorm": (plain_norm, functools.partial(rms_norm.rms_norm, eps=1e-5), (x, weight)),
        "SwiGLU": (swiglu.swiglu_reference, swiglu.swiglu, (both,)),
    }
    found = []
    for name, (plain, used, arguments) in cases.items():
        row: Row = {"layer": name, "rows": rows_of, "width": arguments[0].shape[-1]}
        forms = {"plain": plain, "as used": used, "torch.compile": torch.compile(plain, dynamic=False)}
        for form, function in forms.items():
            try:
                row[f"{form}, ms"] = milliseconds(lambda: _backward(function, arguments), device, 10, calls=1)  # noqa: B023
            except Exception as error:  # torch.compile needs a C++ compiler on a CPU
                row[f"{form}, ms"] = f"{type(error).__name__}"
        found.append(row)
    return found


def kernels(device: torch.device) -> list[Row]:
    """Every form of the operations that have several (`train.kernels`)."""
    from megatron_bit.bench import kernels as forms

    return forms.measure(device)


def profile(device: torch.device) -> list[Row]:
    """The ten operations that a training step spends most of its time in."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from megatron_bit.bench.train import build_contestant
    from megatron_bit.config import load_config
    from megatron_bit.parallel import groups as process_groups

    few = [] if device.type == "cuda" else _FEW
    config = load_config(preset="125m" if device.type == "cuda" else "laptop", overrides=few)
    groups = process_groups.init(config)
    model = build_contestant("BitLM", config, 2**config.model.bits, groups)
    model.steps(3, groups)
    kinds = [ProfilerActivity.CUDA, ProfilerActivity.CPU] if device.type == "cuda" else [ProfilerActivity.CPU]
    with profiler(activities=kinds) as seen:
        model.steps(3, groups)
        if device.type == "cuda":
            torch.cuda.synchronize()
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    return [
        {
            "operation": e.key[:80],
            "share": getattr(e, key) / total,
            "ms a step": getattr(e, key) / 3e3,
            "calls": e.count // 3,
        }
        for e in events[:10]
    ]


def bench_125m(device: torch.device) -> list[Row]:
    """`megatron-bit bench train` in bf16."""
    if device.type == "cuda":
        return _bench("train", "--preset", "125m", "--precision", "bf16", "--steps", "5", "--repeats", "5")
    return _bench("train", "--preset", "laptop", "--vocab-size", "4096", "--steps", "1", "--repeats", "2", *_FEW)


def bench_fp8(device: torch.device) -> list[Row]:
    """bf16 and FP8 at width 4096, four layers."""
    if device.type != "cuda":
        return [{"what": "needs a GPU"}]
    sizes = ["model.num_layers=4", "train.micro_batch_size=1", "train.global_batch_size=1", "parallel.tp=1",
             "parallel.pp=1", "parallel.recompute=none"]  # fmt: skip
    words = ["--preset", "8b", "--vocab-size", "131072", "--precision", "bf16", "fp8", "--steps", "5", "--repeats", "5"]
    return _bench("train", *words, *sizes)


def bench_generate(device: torch.device) -> list[Row]:
    """`megatron-bit bench generate`."""
    if device.type == "cuda":
        return _bench("generate", "--preset", "125m", "--vocab-size", "32768", "--tokens", "64", "--repeats", "3")
    return _bench("generate", "--batch", "1", "--tokens", "8", "--prompt", "8", "--repeats", "1")


CHECKS = {
    f.__name__: f
    for f in (
        environment, engine, attention, fp8, training, waits, layers, kernels, profile, bench_125m, bench_fp8,
        bench_generate,
    )
}  # fmt: skip
_FEW = ("data.seq_length=64", "train.global_batch_size=2", "train.micro_batch_size=2")


def _with_gradients(layer: Any, tensors: list[Tensor], start: Tensor, gradients: bool) -> list[Tensor]:
    q, k, v = (t.detach().requires_grad_(gradients) for t in tensors)
    out = layer(q, k, v, start)
    if not gradients:
        return [out]
    out.backward(torch.ones_like(out))
    return [out.detach(), *(t.grad for t in (q, k, v))]  # type: ignore[list-item]


def _linear(function: Callable[[Tensor], Any], x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, and the gradients of input and weight if it takes part."""
    x = x.detach().requires_grad_()
    weight.grad = None
    out = function(x)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(grad.to(out.dtype))
    found = [out.detach(), x.grad, weight.grad]
    return [t for t in found if t is not None]


def _backward(function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> None:
    for argument in arguments:
        argument.grad = None
    out = function(*arguments)
    out.backward(torch.ones_like(out))


def _data(folder: Path) -> Path:
    """A small prepared folder, of Python's own documentation strings."""
    import typing

    text = folder / "text.txt"
    words = " ".join(str(getattr(module, "__doc__", "")) for module in (json, typing, tempfile, subprocess, torch.nn))
    text.write_text("\n\n".join(f"{i} {words}" for i in range(40)))
    _command("prepare", str(text), "--out", str(folder / "data"), "--vocab-size", "512")
    return folder / "data"


def _train(run: Path, words: list[str], device: str) -> None:
    hide = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    _command("train", "--preset", "laptop", f"run={run}", *words, **hide)


def _losses(run: Path) -> list[float]:
    return [round(json.loads(line)["loss"], 5) for line in (run / "log.jsonl").read_text().splitlines()]


def _bench(what: str, *words: str) -> list[Row]:
    rows = json.loads(_command("bench", what, *words, "--json"))["rows"]
    return [{k: (v["median"] if isinstance(v, dict) and "median" in v else v) for k, v in row.items()} for row in rows]


def _command(*words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_bit", *words], env={**os.environ, **environment}, stdout=subprocess.PIPE,
        text=True, check=True,
    )  # fmt: skip
    return done.stdout


if __name__ == "__main__":
    name, kind, target = sys.argv[1:]
    if kind == "cuda" and not torch.cuda.is_available():
        result: dict[str, Any] = {"state": "failed", "why": "torch sees no GPU"}
    else:
        rows = CHECKS[name](torch.device(kind))
        if name == "kernels" and kind == "cuda":
            from megatron_bit.bench.kernels import write

            write(rows, torch.device(kind), Path(target).with_name("measured.json"))
        result = {"state": "ok" if all(row.get("right", True) for row in rows) else "wrong", "rows": rows}
    Path(target).write_text(json.dumps(result))
