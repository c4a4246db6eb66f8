"""Forward and backward of one global batch: megatron-core's pipeline schedule, or DeepSpeed's loop without one."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_bit.model.chunk import ModelChunk, TokenBatch, num_metrics
from megatron_bit.optim.optimizer import Optimizer
from megatron_bit.parallel.groups import Groups
from megatron_bit.precision.linears import linears_of


def forward_backward(batches: Sequence[TokenBatch], optimizer: Optimizer, groups: Groups) -> Tensor:
    """Accumulate the gradients of this rank's micro-batches.

    Returns:
        float32 [2] (loss, bound; more with a noise table, `LossOutput.metrics`): this rank's contribution to the mean
        over the global batch, so that a sum over all ranks gives it. Zero where the loss is not computed.
    """
    dims, chunks = groups.dims, optimizer.chunks
    with linears_of(chunks[0]).step(chunks):
        metrics = optimizer.forward_backward(batches) if optimizer.managed else pipeline(batches, chunks, groups)
    if not metrics:
        return torch.zeros(num_metrics(chunks), device=groups.device)
    replicas = 1 if dims.sequence_parallel else dims.tp
    return torch.stack(list(metrics)).sum(0) / (len(batches) * dims.dp * replicas)


def pipeline(
    batches: Sequence[TokenBatch], chunks: Sequence[Any], groups: Groups, forward_only: bool = False
) -> list[Tensor]:
    """Run megatron-core's schedule (1F1B, interleaved with several chunks). Returns the last stage's metrics."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    chunks = list(chunks)
    micro_batch, length = batches[0].tokens.shape[:2]
    outputs = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=micro_batch,
        forward_only=forward_only,
        p2p_communicator=P2PCommunicator(groups.collection.pp, chunks[0].config),
        pg_collection=groups.collection,
    )
    return [output["metrics"] for output in outputs]


def _forward_step(batches: Iterator[TokenBatch], model: ModelChunk) -> tuple[Tensor, Any]:
    """What the schedule calls for each micro-batch: the output, and how to turn it into a loss."""
    output = model(next(batches))
    if isinstance(output, Tensor):
        return output, None  # the schedule asks for a loss on the last stage only
    return output.loss, functools.partial(_loss, metrics=output.metrics)


def _loss(loss: Tensor, metrics: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return loss, {"metrics": metrics}
