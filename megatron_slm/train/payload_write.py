"""Writes the payload of a checkpoint in core's ``torch_dist`` format: what would change is copied first, then written.

Between the two a run may go on training: ``stage`` leaves nothing that a later step could reach, and ``write`` uses a
process group of its own. Without that, both follow each other and nothing is copied.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper
from torch.futures import Future

from megatron_slm.train.payload import COMMON_FILE

T = TypeVar("T")


@dataclass(frozen=True)
class StagedPayload:
    """This rank's part of a checkpoint, ready to be written."""

    shards: dict[str, Any]
    """Tensors as torch's checkpoints take them, and serialised objects."""
    common: bytes
    """Contents of ``common.pt``."""


def stage(payload: dict[str, Any], *, copy: bool) -> StagedPayload:
    """Take core's sharded state apart into what this rank writes.

    Args:
        payload: sharded tensors and objects, and plain values, under their names in a program.
        copy: copy tensors into host memory, so that they may change before they are written.
    """
    sharded, common = save_preprocess(payload, validate_access_integrity=False)
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    if copy:
        for shards in flat.values():
            for shard in shards:
                if isinstance(shard, ShardedTensor):
                    shard.data = shard.data.detach().to("cpu", copy=True)
    stream = io.BytesIO()
    torch.save(common, stream)
    return StagedPayload(mcore_to_pyt_state_dict(flat, False), stream.getvalue())


def write(staged: StagedPayload, directory: Path, group: dist.ProcessGroup | None) -> None:
    """Write all ranks' parts into ``directory``; collective over ``group``, any thread.

    Raises:
        CheckpointException: of torch, on every rank when one of them has failed.
    """
    if dist.get_rank(group) == 0:
        (directory / COMMON_FILE).write_bytes(staged.common)
        save_config(CheckpointingConfig("torch_dist", 1), str(directory))
    torch.distributed.checkpoint.save(
        staged.shards,
        storage_writer=SteadyWriter(directory, thread_count=1, sync_files=True),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        process_group=group,
    )


def on_first_rank(name: str, work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Result of ``work`` on rank 0, on every rank; collective over ``group``.

    Raises:
        CheckpointException: of torch, on every rank when it has failed.
    """
    result: T = _DistWrapper(group, True, 0).broadcast(name, work)
    return result


class SteadyWriter(FileSystemWriter):
    """torch's writer, which forks no process beside a CUDA context as core's does, and stores no path or random id.

    So two saves of the same state are the same bytes.
    """

    def storage_meta(self) -> None:
        """Nothing but the tensors."""
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's files.

        Raises:
            OSError: the disk takes no more. torch would say that a position is unexpected.
        """
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
