"""Process groups of a layout. The one file that touches core's ``parallel_state``; others receive the collection."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_slm.parallel.config import ParallelConfig
from megatron_slm.parallel.device import default_backend


@contextlib.contextmanager
def process_groups(
    config: ParallelConfig, *, device: str, rank: int, world_size: int, master: tuple[str, int]
) -> Iterator[ProcessGroupCollection]:
    """Join the job and build the groups of every axis; leave and destroy them on exit.

    Args:
        config: degrees, backend and time-out of every collective.
        device: "cuda" or "cpu".
        master: host and port on which rank 0 listens.
    """
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    dist.init_process_group(
        config.distributed_backend or default_backend(device),
        init_method=f"tcp://{master[0]}:{master[1]}",
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    try:
        yield build_groups(config)
    finally:
        destroy_groups()


def build_groups(config: ParallelConfig) -> ProcessGroupCollection:
    """Groups of the layout over the default group, which must exist already. Coordinates: order tp-cp-ep-dp-pp."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        # Core reads 1 as "interleave one chunk"; without interleaving it wants None.
        virtual_pipeline_model_parallel_size=config.vpp_size if config.vpp_size > 1 else None,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
        create_gloo_process_groups=False,
    )
    return ProcessGroupCollection.use_mpu_process_groups()


def background_group(config: ParallelConfig) -> dist.ProcessGroup:
    """A second group of all ranks over gloo, for one thread beside the training thread. Collective.

    Two threads on one group would meet each other's exchanges; and what is written lies in host memory.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=config.distributed_timeout_minutes))


def destroy_groups() -> None:
    """Forget core's groups and leave the default group. Never raises: it runs while an error is on its way."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def is_last_pipeline_rank(groups: ProcessGroupCollection) -> bool:
    """True on ranks whose last chunk computes the loss."""
    return bool(groups.pp.rank() == groups.pp.size() - 1)


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank when ``flag`` is true on one of them. One all-reduce over the world."""
    value = torch.tensor([int(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def sum_over_world_from(values: torch.Tensor, *, counts: bool) -> torch.Tensor:
    """Sum ``values`` over the ranks for which ``counts`` is true; every rank gets the result. Shape unchanged."""
    values = values.clone() if counts else torch.zeros_like(values)
    dist.all_reduce(values)
    return values
