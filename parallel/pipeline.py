"""The call into core's schedules: one global batch through all pipeline stages, forward or forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

Batch = dict[str, Tensor]
LossFunction = Callable[[Tensor, Batch], tuple[Tensor, Tensor, dict[str, Tensor]]]


def run_schedule(
    chunks: list[nn.Module],
    micro_batches: list[Batch],
    loss: LossFunction,
    *,
    forward_only: bool,
    seq_length: int,
    groups: Any,
) -> list[dict[str, Tensor]]:
    """Run every micro-batch of this data-parallel rank through core's schedule.

    Without a pipeline that is gradient accumulation; with one it is 1F1B, or interleaved 1F1B when there are several
    chunks. Gradients end in the chunks' buffers, reduced and divided by the global number of loss tokens.

    Args:
        micro_batches: tensors [B, S/cp] on the device, ``document_ids`` [B, S] on the host; equal on tp and pp ranks.
        seq_length: S, of the whole sequence.
        loss: (model output, batch) -> (sum, number of loss tokens, what to log).

    Returns:
        What ``loss`` asked to log, one entry per micro-batch, on the rank that ends the model; empty elsewhere.
    """

    def forward_step(data: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(data)
        output = model(
            input_ids=batch["tokens"],
            position_ids=batch["position_ids"],
            attention_mask=batch.get("document_ids"),
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
        return output, lambda value: loss(value, batch)

    schedule = get_forward_backward_func(pp_size=groups.pp.size(), vp_size=len(chunks) if len(chunks) > 1 else None)
    iterators = [iter(micro_batches) for _ in chunks]
    logged: list[dict[str, Tensor]] = schedule(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=seq_length,
        micro_batch_size=micro_batches[0]["tokens"].shape[0],
        forward_only=forward_only,
    )
    return logged
