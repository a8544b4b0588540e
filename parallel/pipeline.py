"""The call into core's schedules: one global batch through all pipeline stages, forward or forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor, nn

Batch = dict[str, Tensor]
LossFunction = Callable[[Tensor, Batch], tuple[Tensor, Tensor, dict[str, Tensor]]]


def forward_step(
    data: Iterator[Batch], model: nn.Module, *, loss: LossFunction
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The next micro-batch through one chunk, as core's schedules ask for it."""
    batch = next(data)
    output = model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=batch.get("document_ids"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        fields=batch,
    )
    return output, lambda value: loss(value, batch)


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

    schedule = get_forward_backward_func(pp_size=groups.pp.size(), vp_size=len(chunks) if len(chunks) > 1 else None)
    iterators = [iter(micro_batches) for _ in chunks]
    with _nothing_to_reduce(chunks) if forward_only else contextlib.nullcontext():
        logged: list[dict[str, Tensor]] = schedule(
            forward_step_func=partial(forward_step, loss=loss),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=seq_length,
            micro_batch_size=micro_batches[0]["tokens"].shape[0],
            forward_only=forward_only,
        )
    return logged


@contextlib.contextmanager
def _nothing_to_reduce(chunks: list[nn.Module]) -> Iterator[None]:
    """Without a backward pass core's pipelined schedule enters the context that holds back reductions for good.


    It ends when the garbage collector finds it: in the middle of a later step, if anything (a profiler, a traceback)
    holds the schedule's frame until then. Reductions would start there before all micro-batches are added up.
    """
    config = get_model_config(chunks[0])
    kept, config.no_sync_func = config.no_sync_func, None
    try:
        yield
    finally:
        config.no_sync_func = kept


def forward_chunk(
    chunk: nn.Module, batch: Batch, loss: LossFunction, received: Tensor | None, *, ends: bool, groups: Any
) -> Tensor:
    """One micro-batch through one chunk, alone: what every schedule of core does between its exchanges.

    Args:
        received: output of the chunk before, [S/(cp tp), B, H]; None where the model begins.
        ends: whether this chunk ends the model; the result is then the loss.
    """
    config = get_model_config(chunk)
    output, _ = schedules.forward_step(
        partial(forward_step, loss=loss),
        iter([batch]),
        chunk,
        num_microbatches=1,
        input_tensor=received,
        forward_data_store=[],
        config=config,
        cp_group_size=groups.cp.size(),
        vp_stage=get_attr_wrapped_model(chunk, "vp_stage"),
        is_last_stage=ends,
    )
    result: Tensor = output
    return result


def release_output(output: Tensor, chunk: nn.Module) -> None:
    """Give back the memory of an output that was sent, where the device allows it."""
    schedules.deallocate_output_tensor(output, get_model_config(chunk).deallocate_pipeline_outputs)


def backward_chunk(chunk: nn.Module, received: Tensor | None, output: Tensor, gradient: Tensor | None) -> Tensor | None:
    """The backward pass of :func:`forward_chunk`; gives the gradient of ``received``.

    Args:
        gradient: of ``output``; None where it is the loss.
    """
    found: Tensor | None = schedules.backward_step(
        received, output, gradient, ModelType.encoder_or_decoder, get_model_config(chunk)
    )
    return found
