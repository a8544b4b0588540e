"""Checkpoints in core's ``torch_dist`` format: what a resume needs, under any layout, published in two phases.

A checkpoint directory holds core's payload (``*.distcp``, ``.metadata``, ``common.pt``, ``metadata.json``), our
``state.json`` (step, data cursor, layout, schema version), ``config.yaml``, ``tokenizer/`` and ``manifest.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter

from megatron_slm.errors import CheckpointError
from megatron_slm.parallel.gradients import unwrap
from megatron_slm.train import publish
from megatron_slm.train.optimizer_state import load_optimizer_state
from megatron_slm.train.random_state import RandomState

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SavedState:
    """``state.json``: the part of a checkpoint that is not tensors."""

    step: int
    consumed_samples: int
    cursor: dict[str, Any]
    layout: dict[str, int]
    params_dtype: str
    tokenizer_hash: str
    schema_version: int = SCHEMA_VERSION


class ThreadedSave(SaveShardedStrategy):
    """Core's torch_dist payload through torch's own ``FileSystemWriter``.

    Core's writer forks worker processes and spawns a manager that imports the program again: seconds a save, and a fork
    beside a CUDA context. The files are the same.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def can_handle_sharded_objects(self) -> bool:
        """Objects (random states) go into the same files as tensors."""
        return True

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Write this rank's shards; collective."""
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        torch.distributed.checkpoint.save(
            mcore_to_pyt_state_dict(flat, False),
            storage_writer=FileSystemWriter(checkpoint_dir, thread_count=1, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save(
    directory: Path,
    state: SavedState,
    chunks: list[nn.Module],
    optimizer: MegatronOptimizer,
    random: RandomState,
    *,
    add_files: Callable[[Path], None],
) -> Path:
    """Write and publish ``directory/iter_NNNNNNN``; collective. Nothing refers to it before it is durable.

    Args:
        directory: the run's checkpoints directory.
        add_files: called on rank 0 with the temporary directory, to add the configuration and the tokenizer.
    """
    first = dist.get_rank() == 0
    shared = [str(publish.begin(directory, state.step)) if first else ""]
    dist.broadcast_object_list(shared, src=0)
    temporary = Path(shared[0])
    payload = {**_model_and_optimizer(chunks, optimizer, is_loading=False), "random": _random_object(random.capture())}
    dist_checkpointing.save(
        payload,
        str(temporary),
        sharded_strategy=ThreadedSave(),
        validate_access_integrity=False,
        content_metadata=_content(),
    )
    dist.barrier()
    final = publish.checkpoint_path(directory, state.step)
    if first:
        (temporary / "state.json").write_text(json.dumps(asdict(state), indent=1))
        add_files(temporary)
        publish.publish(temporary, final)
    dist.barrier()
    return final


def read_state(path: Path) -> SavedState:
    """``state.json`` of a checkpoint.

    Raises:
        CheckpointError: it is missing, not JSON, or of another schema version.
    """
    file = path / "state.json"
    try:
        fields = json.loads(file.read_text())
        version = fields["schema_version"]
        if version != SCHEMA_VERSION:
            raise CheckpointError(
                f"{file} has schema version {version}, this program reads {SCHEMA_VERSION}; "
                "use the program version that wrote it"
            )
        return SavedState(**fields)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint: {file.name} is missing; name an iter_NNNNNNN directory"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); choose another checkpoint") from error


def load(
    path: Path, chunks: list[nn.Module], optimizer: MegatronOptimizer, random: RandomState, *, layout: dict[str, int]
) -> SavedState:
    """Read weights, optimizer and, under the layout it was saved with, random states. Collective.

    Under another layout the random states have no owner: ``random`` is seeded anew from the seed and the step.

    Raises:
        CheckpointError: damaged, or of another model.
    """
    state = read_state(path)
    same_layout = state.layout == layout
    request = _model_and_optimizer(chunks, optimizer, is_loading=True)
    if same_layout:
        request["random"] = _random_object(None)
    loaded = _read(request, path)
    _load_chunks(loaded, chunks)
    load_optimizer_state(optimizer, loaded["optimizer"])
    if same_layout:
        random.restore(loaded["random"])
    else:
        random.reseed(state.step)
    return state


def find(path: Path) -> Path:
    """The checkpoint that ``path`` means: an iter_NNNNNNN directory, a checkpoints directory, or a run's directory.

    Raises:
        CheckpointError: there is none.
    """
    if (path / "state.json").exists():
        return path
    for directory in (path, path / "checkpoints"):
        if (latest := publish.latest(directory)) is not None:
            return latest
    raise CheckpointError(f"{path} holds no checkpoint: name a run's directory or one of its iter_NNNNNNN directories")


def load_weights(path: Path, chunks: list[nn.Module], optimizer: MegatronOptimizer | None = None) -> None:
    """Read the weights alone, of any layout; an optimizer's master copies follow them. Collective."""
    read_state(path)
    _load_chunks(_read(_models(chunks), path), chunks)
    if optimizer is not None:
        optimizer.reload_model_params()


def write_tokenizer(model: bytes, checkpoint: Path) -> None:
    """Put the tokenizer's model beside the weights it belongs to, as ``tokenizer/tokenizer.model``."""
    (checkpoint / "tokenizer").mkdir()
    (checkpoint / "tokenizer" / "tokenizer.model").write_bytes(model)


def _content() -> dict[str, Any]:
    """What core is told about the payload, in a new dictionary each time because core adds process groups to it.

    "Fully reshardable" gathers the optimizer's flat buffers into tensors of the parameters' own shapes: any layout can
    read it.
    """
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def _models(chunks: list[nn.Module]) -> dict[str, Any]:
    """Sharded state of every chunk. Keys inside are global names, so chunks of another layout find theirs."""
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    return {
        name: unwrap(chunk).sharded_state_dict(metadata=_content()) for name, chunk in zip(names, chunks, strict=True)
    }


def _model_and_optimizer(chunks: list[nn.Module], optimizer: MegatronOptimizer, *, is_loading: bool) -> dict[str, Any]:
    models = _models(chunks)
    state = optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=_content())
    return {**models, "optimizer": state}


def _random_object(state: Any) -> ShardedObject:
    """One entry a rank. Their number is the world size, so they are asked for only under the same layout."""
    return ShardedObject("random", state, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)


def _read(request: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(request, str(path), validate_access_integrity=False)
        return loaded
    except (CheckpointingException, dist.checkpoint.api.CheckpointException, RuntimeError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read into this model: {str(error).splitlines()[0]}; "
            "check that the model section is the one in its config.yaml, or choose another checkpoint"
        ) from error


def _load_chunks(loaded: dict[str, Any], chunks: list[nn.Module]) -> None:
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded["model" if len(chunks) == 1 else f"model{index}"])
