"""Gradient buffers, their reduction over data-parallel ranks, and the hooks the schedule calls around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_slm.parallel.config import ParallelConfig
from megatron_slm.parallel.router import forget_counts


def wrap(
    chunks: list[nn.Module], config: TransformerConfig, parallel: ParallelConfig, groups: Any, *, reduce_in_fp32: bool
) -> list[DistributedDataParallel]:
    """Give every chunk core's gradient buffers, after the weights exist and before the optimizer reads them.

    Args:
        reduce_in_fp32: half-precision parameters accumulate and reduce their gradients in fp32.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=reduce_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        bucket_size=parallel.ddp_bucket_size,
        reduce_scatter_with_fp32_accumulation=parallel.reduce_scatter_with_fp32_accumulation,
        check_for_nan_in_grad=False,  # core's check names only a rank; the loop checks the norm it already has
    )
    wrapped = [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp_config,
            module=chunk,
            # Later chunks reduce while earlier ones still compute: one bucket is enough there (core's training loop).
            disable_bucketing=index > 0,
            pg_collection=groups,
        )
        for index, chunk in enumerate(chunks)
    ]
    _connect(wrapped, config, parallel, groups)
    return wrapped


def _connect(chunks: Sequence[Any], config: TransformerConfig, parallel: ParallelConfig, groups: Any) -> None:
    """Tell the schedule how to skip, start and finish the reduction. Core reads these from the model's config."""
    config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=groups)
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]


@contextlib.contextmanager
def gathered_parameters(chunks: Sequence[Any]) -> Iterator[None]:
    """Full parameters for a while: an overlapped gather is finished now, and its hooks rest until training goes on."""
    overlapped = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()


def gather_parameters(chunks: Sequence[Any]) -> None:
    """Bring every rank the whole parameters after their owners have changed them; collective.

    To be called inside ``gathered_parameters``. Without the distributed optimizer each rank owns them all.
    """
    for chunk in chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)


@contextlib.contextmanager
def before_reduction(chunks: Sequence[Any], listen: Callable[[list[nn.Parameter]], None]) -> Iterator[None]:
    """For a while, ``listen`` to every group of buckets just before its reduction starts.

    Its parameters' ``main_grad`` are then this rank's own: summed over the micro-batches, not over ranks. Once a step
    for each group, in the order in which they start. A group of one rank has nothing to reduce and is passed over.
    """
    groups = [
        group
        for chunk in chunks
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)
        if _reducing_group(group).size() > 1
    ]

    def heard(group: Any, start: Callable[..., None]) -> Callable[..., None]:
        def start_grad_sync(*arguments: Any, **options: Any) -> None:
            if group.grad_reduce_handle is None:  # else core's own call returns at once
                for listener in group.listeners:
                    listener([param for bucket in group.buckets for param in bucket.params_list])
            start(*arguments, **options)

        return start_grad_sync

    for group in groups:
        if not hasattr(group, "listeners"):
            group.listeners = []
            group.start_grad_sync = heard(group, group.start_grad_sync)
        group.listeners.append(listen)
    try:
        yield
    finally:
        for group in groups:  # several listen at once, and need not end in the order in which they began
            group.listeners.remove(listen)
            if not group.listeners:
                del group.start_grad_sync, group.listeners


def _reducing_group(group: Any) -> Any:
    """The ranks over which a group of buckets is reduced; core names them by what it does with the result."""
    if group.ddp_config.use_distributed_optimizer:
        return group.intra_distributed_optimizer_instance_group
    return group.data_parallel_group


def zero_gradients(chunks: Sequence[Any]) -> None:
    """Begin a step: clear the gradient buffers, which gradients have arrived, and what routers have counted."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    forget_counts(chunks)


def unwrap(chunk: Any) -> Any:
    """The model inside core's gradient-buffer and half-precision wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
