"""Reads the payload of a checkpoint: into the model's own shards, or tensor by tensor. No pickle in it runs anything.

Core's own load unpickles in four places: ``.metadata``, ``common.pt``, the objects among the shards, and the shards
themselves. Here the first goes through ``payload_index``, the others through torch's unpickler for weights, which knows
tensors and plain containers alone.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import LoadShardedStrategy
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_slm.errors import CheckpointError
from megatron_slm.train.manifest import read_regular, regular_size
from megatron_slm.train.payload_index import Chunk, PayloadIndex, Span, read_index

COMMON_FILE = "common.pt"
NOT_WEIGHTS = (
    "it holds something else than tensors and plain values, which might run when loaded, or it is damaged; nothing was "
    "run. Use a checkpoint from a source you trust"
)

READ_ERRORS = (
    CheckpointingException, CheckpointException, pickle.UnpicklingError, RuntimeError, KeyError, TypeError, ValueError,
    OSError, EOFError,
)  # fmt: skip
"""What core and torch raise of files that they cannot read, or that are of another model."""
DAMAGED_ERRORS = (OSError, EOFError, TypeError, json.JSONDecodeError, UnicodeDecodeError)
"""Those among them that no choice of a model would mend."""


def read_payload(request: dict[str, Any], path: Path) -> dict[str, Any]:
    """Fill ``request``, core's sharded tensors and objects under their names in a program. Collective.

    Raises:
        CheckpointError: damaged, refused because it would run code, or without something that is asked for.
    """
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(
            request,
            str(path),
            sharded_strategy=WeightsOnlyLoad(),
            common_strategy=WeightsOnlyCommon(),
            validate_access_integrity=False,
        )
        return loaded
    except CheckpointError:
        raise
    except READ_ERRORS as e:
        cause = first_failure(e)
        if isinstance(cause, CheckpointError | pickle.UnpicklingError):
            said = cause if isinstance(cause, CheckpointError) else NOT_WEIGHTS
            raise CheckpointError(f"{path} is refused: {said}") from e
        if isinstance(cause, DAMAGED_ERRORS) or "PytorchStreamReader" in str(cause):
            raise CheckpointError(f"{path} is damaged ({_said(cause)}); choose another checkpoint") from e
        raise CheckpointError(
            f"{path} cannot be read into this model: {_said(cause)}; "
            "check that the model section is the one in its config.yaml, or choose another checkpoint"
        ) from e


def first_failure(error: BaseException) -> BaseException:
    """The exception of the first rank that failed, where torch has gathered those of all ranks."""
    if isinstance(error, CheckpointException) and error.failures:
        return error.failures[min(error.failures)][0]
    return error


class WeightsOnlyCommon(TorchCommonLoadStrategy):
    """Core's ``common.pt`` (options of the optimizer) as plain values."""

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        """Everything that is stored once, not by rank."""
        return read_common(Path(checkpoint_dir))


class WeightsOnlyLoad(LoadShardedStrategy):
    """Core's ``TorchDistLoadShardedStrategy`` with a reader and a planner that run nothing."""

    def load(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        """Read this rank's shards; collective."""
        asked = [tensor for tensor in nested_values(sharded_state_dict) if isinstance(tensor, ShardedTensor)]
        flat, structure, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        target = mcore_to_pyt_state_dict(flat, True)
        torch.distributed.checkpoint.load(
            target,
            storage_reader=IndexedReader(Path(checkpoint_dir)),
            planner=WeightsOnlyPlanner(
                shapes_validation_sharded_tensors=[tensor for tensor in asked if not tensor.allow_shape_mismatch],
                allow_shape_mismatch_sharded_tensors={
                    tensor.key: tensor for tensor in asked if tensor.allow_shape_mismatch
                },
            ),
        )
        unwrapped = {name: _unwrap_pyt_sharded_tensor(value) for name, value in target.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(unwrapped, structure, renamed)
        _restore_dict_types(loaded, sharded_state_dict)
        return loaded

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Objects (random states) are in the same files as tensors."""
        return True

    def load_tensors_metadata(self, checkpoint_dir: str | Path) -> dict[str, ShardedTensor]:
        """Name -> global shape and dtype of every tensor, without its data, as core asks for it."""
        tensors = read_index(Path(checkpoint_dir)).tensors
        shapes = {
            name: torch.empty(t.shape, dtype=getattr(torch, t.dtype), device="meta") for name, t in tensors.items()
        }
        return {name: ShardedTensor.from_rank_offsets(name, shape).without_data() for name, shape in shapes.items()}

    def check_backend_compatibility(self, loaded_version: Any) -> None:
        """The manifest's and the state's versions decide."""

    def check_version_compatibility(self, loaded_version: Any) -> None:
        """The manifest's and the state's versions decide."""


class IndexedReader(FileSystemReader):
    """torch's reader of tensors (which takes weights only) with the index of ``payload_index``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        # Not when torch asks for it: it would take an error here for a checkpoint of another kind, and go on.
        self._index = read_index(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index as torch's own classes."""
        return to_metadata(self._index)


class WeightsOnlyPlanner(MCoreLoadPlanner):
    """Core's planner, which loads objects as plain values."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Put one object where it was asked for."""
        self.original_state_dict[self.mappings[read_item.dest_index.fqn][0]] = _weights(value)


def to_metadata(index: PayloadIndex) -> Metadata:
    """The index in the form that torch's readers and writers share."""
    described: dict[str, Any] = {name: BytesStorageMetadata() for name in index.objects}
    stored = {MetadataIndex(name): _StorageInfo(*span) for name, span in index.objects.items()}
    for name, tensor in index.tensors.items():
        described[name] = TensorStorageMetadata(
            TensorProperties(dtype=getattr(torch, tensor.dtype)),
            torch.Size(tensor.shape),
            [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in tensor.chunks],
        )
        stored |= {MetadataIndex(name, chunk.offsets): _StorageInfo(*chunk.span) for chunk in tensor.chunks}
    return Metadata(state_dict_metadata=described, planner_data={}, storage_data=stored, storage_meta=StorageMeta())


def read_tensor(path: Path, index: PayloadIndex, name: str) -> torch.Tensor:
    """One whole tensor of the checkpoint in ``path``, of its global shape, on the CPU; without ranks.

    Raises:
        CheckpointError: there is no such tensor, or its bytes are damaged.
    """
    if name not in index.tensors:
        raise CheckpointError(f"{path} has no tensor {name!r}; mslm checkpoint inspect lists them")
    stored = index.tensors[name]
    whole = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
    for chunk in stored.chunks:
        block = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[block].copy_(read_chunk(path, name, chunk))
    return whole


def read_chunk(path: Path, name: str, chunk: Chunk) -> torch.Tensor:
    """One stored block of tensor ``name``, of the shape ``chunk.sizes``.

    Raises:
        CheckpointError: its bytes are damaged, or of another shape.
    """
    try:
        data: torch.Tensor = _weights(io.BytesIO(_bytes(path, chunk.span)))
        return data.reshape(chunk.sizes)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / chunk.span.file} is damaged at {name} ({_said(error)})") from error


def read_object(path: Path, index: PayloadIndex, name: str) -> Any:
    """One object that is no tensor: plain containers of numbers, strings and tensors."""
    return _weights(io.BytesIO(_bytes(path, index.objects[name])))


def read_common(path: Path) -> Any:
    """What is stored once, not by rank.

    Raises:
        CheckpointError: missing, damaged or refused.
    """
    file = path / COMMON_FILE
    try:
        return _weights(io.BytesIO(read_regular(file)))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; choose another checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); choose another checkpoint") from error
    except CheckpointError as error:
        raise CheckpointError(f"{file} is refused: {error}") from error


def _bytes(path: Path, span: Span) -> bytes:
    """What a span refers to.

    Raises:
        CheckpointError: the file is missing or cannot be read.
    """
    file = path / span.file
    try:
        regular_size(file)
        with file.open("rb") as stream:
            stream.seek(span.start)
            return stream.read(span.length)
    except (OSError, OverflowError, MemoryError) as error:  # of a span that no file could hold
        raise CheckpointError(f"{file} cannot be read ({_said(error)}); choose another checkpoint") from error


def _weights(stream: io.BytesIO) -> Any:
    """torch's unpickler for weights.

    Raises:
        CheckpointError: the stream holds anything but tensors, numbers, strings and containers of them.
    """
    try:
        with warnings.catch_warnings():
            # torch says of an old pickle how to load it unsafely, just before it refuses it.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(NOT_WEIGHTS) from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"it is damaged ({_said(error)})") from error


def _said(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
