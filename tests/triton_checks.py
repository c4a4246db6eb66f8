"""Triton's kernels against the plain forms in float64, outputs and gradients; run by tests/triton_worker.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from mbit_kernels.cross_entropy import group_cross_entropy
from mbit_kernels.decode import nearest_token
from mbit_kernels.matched_filter import bit_loss
from mbit_kernels.rms_norm import modulated_rms_norm_reference
from torch import Tensor

from megatron_bit.config import load_config
from megatron_bit.diffusion.bit_groups import BitGroups
from megatron_bit.diffusion.noised import noised_bits
from megatron_bit.diffusion.philox import seed_key
from megatron_bit.model.build import build_model
from megatron_bit.model.chunk import TokenBatch
from megatron_bit.model.kernels import function
from megatron_bit.parallel import groups as parallel_groups

# of bfloat16 the interpreter rounds towards zero, so a whole unit in the last place
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-7}


def close(got: Tensor | None, wanted: Tensor | None, dtype: torch.dtype, more: float = 1.0) -> None:
    """Equal but for rounding of values as large as the largest (sums cancel)."""
    assert got is not None and wanted is not None
    limit = more * TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), wanted.double(), rtol=limit, atol=limit * wanted.abs().max().item())


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _compare(
    kernel: Callable[..., Any], plain: Callable[..., Any], tensors: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Of functions of `tensors`: first outputs, and the gradients of all tensors under a random upstream one."""
    mine = [t.detach().requires_grad_() for t in tensors]  # strides as they are
    exact = [t.double().requires_grad_() for t in tensors]
    got, wanted = kernel(*mine), plain(*exact)
    close(got, wanted, dtype)
    upstream = _random(*got.shape, seed=9).to(got.dtype)
    got.backward(upstream)
    wanted.backward(upstream.double())
    for a, b in zip(mine, exact, strict=True):
        assert a.grad is not None and a.grad.dtype == a.dtype
        close(a.grad, b.grad, dtype)


def check_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """x beside the parts of one tensor, as AdaLN's are; all three parts of one; and turned around."""
    kernel = function("modulated_rms_norm", "triton")
    joint = 2 * _random(*shape[:-1], 3 * shape[-1])

    def of(form: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: form(*t.chunk(3, dim=-1), 1e-3)

    def beside(form: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, t: form(x, *t.chunk(3, dim=-1)[1:], 1e-3)

    _compare(of(kernel), of(modulated_rms_norm_reference), [joint.to(dtype)], dtype)
    x = _random(*shape, dtype=dtype, seed=7)
    _compare(beside(kernel), beside(modulated_rms_norm_reference), [x, joint.to(dtype)], dtype)
    turned = [_random(*shape, dtype=dtype, seed=i).transpose(0, -1) for i in range(3)]
    _compare(lambda *t: kernel(*t, 1e-3), lambda *t: modulated_rms_norm_reference(*t, 1e-3), turned, dtype)


def check_bit_loss(bits: int, dtype: torch.dtype, kind: Any, matched: bool, sliced: bool) -> None:
    s, b, samples = 5, 3, 7
    kernel = function("bit_loss", "triton")
    log_sigma = torch.linspace(-2.3, 5.0, s * b * samples)[torch.randperm(s * b * samples)].view(s, b, samples)
    x = _random(s, b, 1, bits, seed=1).sign()
    z = x + log_sigma.exp()[..., None] * _random(s, b, samples, bits, seed=2)
    against = -25 * x * (torch.arange(samples) % 2)[:, None]  # of what the clip leaves at low noise
    residual = (3 * _random(s, b, samples, bits, seed=3) + against).to(dtype)
    if sliced:  # as recomputation calls it
        z, log_sigma, residual = z[:, :, 2:3], log_sigma[..., 2:3], residual[:, :, 2:3]
    for signs in (x, x.to(torch.int8)):
        _compare(
            lambda r: kernel(r, z, signs, log_sigma, kind, matched)[0],  # noqa: B023
            lambda r: _exact_bit_loss(r, z, x, log_sigma, kind, matched)[0],
            [residual], dtype,
        )  # fmt: skip
    error = kernel(residual.clone().requires_grad_(), z, x, log_sigma, kind, matched)[1]
    assert not error.requires_grad
    close(error, _exact_bit_loss(residual.double(), z, x, log_sigma, kind, matched)[1], torch.float32)


def _exact_bit_loss(r: Tensor, z: Tensor, x: Tensor, log_sigma: Tensor, kind: Any, matched: bool) -> Any:
    """The formulas in float64; `bit_loss` itself takes its logits to float32."""
    sigma = log_sigma.double().exp()[..., None]
    logits = r + (2 * z.double() / sigma**2).clamp(-30, 30) * matched
    error = 4 * torch.sigmoid(-x * logits) ** 2
    weighted = error * (1 + sigma**-2) if kind == "mse" else torch.nn.functional.softplus(-x * logits)
    plain = bit_loss(r.detach().float(), z, x, log_sigma, kind, matched)
    close(plain[0], weighted.mean(-1).detach(), torch.float32)
    return weighted.mean(-1), error.detach().sum(-1)


def check_cross_entropy(sizes: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    groups = BitGroups(sizes)
    count, values = groups.count, groups.values
    index = torch.stack([torch.arange(4 * 3).view(4, 3) * 5 % 2**size for size in sizes], dim=-1)
    invalid = groups.invalid if groups.uneven else None
    logits = 5 * _random(4, 3, count, values, seed=4)
    if layout == "grouped":  # as a product over the groups leaves them
        logits = logits.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    elif layout == "swapped":
        logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "part":
        logits = torch.cat((logits, logits), dim=2)[:, :, :count]
    elif layout == "turned":
        logits = logits.transpose(0, 3).contiguous().transpose(0, 3)
    kernel = function("group_cross_entropy", "triton")

    def exact(x: Tensor) -> Tensor:
        x = x if invalid is None else x.masked_fill(invalid, float("-inf"))
        return -x.log_softmax(-1).gather(-1, index[..., None]).squeeze(-1)

    given = logits.to(dtype, memory_format=torch.preserve_format)
    _compare(lambda x: kernel(x, index, invalid), exact, [given], dtype)
    close(group_cross_entropy(given, index, invalid), exact(given.double()), torch.float32)


def check_noised_bits(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    """shape: blocks, block size, micro-batch, samples, bits. Another first block and sample is other noise."""
    blocks, k, b, samples, bits = shape
    width = 37
    table = _random(101, bits).sign().to(torch.int8)
    ids = torch.randint(0, 101, (blocks * k, b), generator=torch.Generator().manual_seed(1))
    log_sigma = _random(blocks, b, samples)
    sample = torch.arange(b) * 3 + 2**33 + 5
    weight = _random(width, bits, seed=2).to(dtype)
    for first in (0, 11):
        key = seed_key(2**62 + 12345, first)
        rest = (key, first, k)
        plain_weight, own_weight = weight.clone().requires_grad_(), weight.clone().requires_grad_()
        x, z, out = noised_bits(ids, table, log_sigma, sample, plain_weight, *rest)
        mine = function("noised_bits", "triton")(ids, table, log_sigma, sample, own_weight, *rest)
        assert torch.equal(mine[0], x) and mine[0].dtype == torch.int8
        sigma = log_sigma.exp().repeat_interleave(k, 0)[..., None]
        assert ((mine[1] - z) / sigma).abs().max() < 5e-6 if z.numel() else mine[1].shape == z.shape
        assert mine[2].dtype == dtype and not mine[1].requires_grad
        close(mine[2], out.detach(), dtype)
        upstream = _random(*out.shape, seed=8).to(dtype)
        out.backward(upstream)
        mine[2].backward(upstream)
        close(own_weight.grad, plain_weight.grad, dtype)
        alone = function("noised_bits", "triton")(ids, table, log_sigma, sample, None, *rest)
        assert alone[2] is None and torch.equal(alone[1], mine[1])


def check_decode(bits: int, codes: int, dtype: torch.dtype) -> None:
    """The same tokens, but where two scores differ by rounding; ties exactly."""
    kernel = function("nearest_token", "triton")
    words = torch.randperm(2**bits if bits < 16 else 40 * codes, generator=torch.Generator().manual_seed(2))[:codes]
    table = ((words[:, None] >> torch.arange(bits)) & 1).to(torch.int8) * 2 - 1
    logits = _random(3, 7, bits, dtype=dtype, seed=5)
    got, wanted = kernel(logits, table), nearest_token(logits, table)
    assert got.shape == wanted.shape and got.dtype == torch.int64
    scores = logits.double() @ table.t().double()
    lost = scores.amax(-1) - scores.gather(-1, got[..., None]).squeeze(-1)
    assert lost.max() < 1e-5
    whole = logits.float().mul(4).round()  # whole numbers: their sums are exact, and many are equal
    assert torch.equal(kernel(whole, table), nearest_token(whole, table))
    assert torch.equal(kernel(torch.zeros(2, bits), table), torch.zeros(2, dtype=torch.int64))
    worse = torch.full((2, bits), -1.0)  # than 0, which what is behind the last code would score
    ones = torch.ones_like(table[:40])
    assert torch.equal(kernel(worse, ones), torch.zeros(2, dtype=torch.int64))
    turned = logits.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(kernel(turned, table), got)


def check_empty() -> None:
    nothing = torch.zeros(0, 3, 8, requires_grad=True)
    out = function("modulated_rms_norm", "triton")(nothing, nothing, nothing, 1e-6)
    out.sum().backward()
    assert out.shape == nothing.shape and nothing.grad is not None
    z = torch.zeros(0, 2, 3, 5, requires_grad=True)
    levels = torch.zeros(0, 2, 3)
    loss, _ = function("bit_loss", "triton")(z, z.detach(), torch.zeros(0, 2, 1, 5), levels, "mse", True)
    loss.sum().backward()
    assert loss.shape == levels.shape
    logits = torch.zeros(0, 2, 3, 8, requires_grad=True)
    nats = function("group_cross_entropy", "triton")(logits, torch.zeros(0, 2, 3, dtype=torch.int64), None)
    nats.sum().backward()
    assert nats.shape == (0, 2, 3)
    table = torch.ones(4, 5, dtype=torch.int8)
    assert function("nearest_token", "triton")(torch.zeros(0, 5), table).shape == (0,)


SIZES = [
    "data.seq_length=12", "model.block_size=3", "model.bits=11", "model.num_layers=1", "model.hidden_size=36",
    "model.num_heads=6", "model.num_kv_heads=2", "model.ffn_hidden_size=39", "model.head.num_layers=1",
    "model.head.hidden_size=20", "model.head.num_heads=5", "model.head.ffn_hidden_size=27",
    "diffusion.noise_samples=3", "train.precision=fp32",
]  # fmt: skip


def check_model(*overrides: str) -> None:
    """Loss and all gradients of a training step with Triton's kernels and with the plain forms."""
    results = []
    for form in ("plain", "triton"):
        config = load_config(preset="laptop", overrides=[*SIZES, *overrides, f"train.kernels={form}"])
        (model,) = build_model(config, 1999, parallel_groups.init(config))
        if form == "triton":
            assert type(model.config.kernels).__name__ == "Kernels"
            assert model.config.kernels.group_cross_entropy.__module__ == "mbit_kernels.triton_cross_entropy"
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        tokens = torch.randint(0, 1999, (2, 12), generator=generator)
        out = model(TokenBatch(tokens, torch.arange(2) + 7))
        out.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        results.append((out.loss.detach(), out.metrics, grads))
        parallel_groups.shutdown()
    (loss, metrics, grads), (other_loss, other_metrics, other_grads) = results
    torch.testing.assert_close(other_loss, loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(other_metrics, metrics, rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        assert grad is not None and other_grads[name] is not None, name
        limit = 1e-5 * max(grad.abs().max().item(), 1e-3)
        torch.testing.assert_close(other_grads[name], grad, rtol=1e-4, atol=limit, msg=lambda m: f"{name}: {m}")  # noqa: B023


def forms_of_rank() -> bool:
    """Whether this rank runs what rank 0's device is said to be best with; rank 1's name is of another row."""
    import os

    from mbit_kernels import choice

    from megatron_bit.model import kernels

    rank = os.environ["RANK"]
    table = {"A": {"bit_loss": {"winner": "compiled"}}, "B": {"nearest_token": {"winner": "compiled"}}}
    choice.measurements = lambda: table
    kernels.device_name = lambda device: "A" if rank == "0" else "B"
    kernels.function = lambda operation, form: form
    config = load_config(preset="laptop", overrides=["parallel.tp=2"])
    bound = kernels.build_kernels(config, parallel_groups.init(config))
    forms: dict[str, Any] = vars(bound)
    return forms == {**dict.fromkeys(kernels.OPERATIONS, "plain"), "bit_loss": "compiled"}
