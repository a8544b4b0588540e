"""A checkpoint's payload in pieces: written block by block, read block by block, without ranks and without the whole.

The files are core's ``torch_dist``, so a run under any layout reads what is written here.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor

from megatron_slm.errors import CheckpointError
from megatron_slm.train.payload import COMMON_FILE, to_metadata
from megatron_slm.train.payload_blocks import Block, TensorReader
from megatron_slm.train.payload_index import METADATA_FILE, Chunk, PayloadIndex, Span, StoredTensor

FILE_BYTES = 4 << 30
"""A new file is begun beyond this size."""


class PayloadWriter:
    """Writes blocks of tensors as they come; ``close`` writes what they are part of.

    Raises:
        OSError, RuntimeError: as of ``torch.save``, when the disk takes no more.
    """

    def __init__(self, directory: Path, *, file_bytes: int = FILE_BYTES) -> None:
        self._directory, self._file_bytes = directory, file_bytes
        self._tensors: dict[str, tuple[str, tuple[int, ...], list[Chunk]]] = {}
        self._objects: dict[str, Span] = {}
        self._stream: IO[bytes] | None = None
        self._files = 0

    def block(self, name: str, data: Tensor, *, offsets: Sequence[int], shape: Sequence[int]) -> None:
        """Write one block of tensor ``name``, whose global shape is ``shape``.

        Args:
            data: of as many dimensions as ``shape``; it begins at ``offsets``.

        Raises:
            CheckpointError: an earlier block of the tensor had another dtype.
        """
        dtype = str(data.dtype).removeprefix("torch.")
        known, _, chunks = self._tensors.setdefault(name, (dtype, tuple(shape), []))
        if dtype != known:
            raise CheckpointError(
                f"{name} is {known} in one layer and {dtype} in another; save the model in one dtype and convert that"
            )
        # torch.save writes the whole storage that a view is of.
        whole = data.contiguous() if data.untyped_storage().nbytes() == data.nbytes else data.clone()
        chunks.append(Chunk(tuple(offsets), tuple(data.shape), self._append(whole)))

    def value(self, name: str, value: Any) -> None:
        """Write something that is no tensor."""
        self._objects[name] = self._append(value)

    def close(self) -> None:
        """Write the index and core's small files."""
        if self._stream is not None:
            self._stream.close()
        tensors = {
            name: StoredTensor(dtype, shape, tuple(all_)) for name, (dtype, shape, all_) in self._tensors.items()
        }
        index = PayloadIndex(tensors, self._objects)
        (self._directory / METADATA_FILE).write_bytes(pickle.dumps(to_metadata(index)))
        common = io.BytesIO()
        torch.save({}, common)
        (self._directory / COMMON_FILE).write_bytes(common.getvalue())
        save_config(CheckpointingConfig("torch_dist", 1), str(self._directory))

    def _append(self, value: object) -> Span:
        if self._stream is None or self._stream.tell() > self._file_bytes:
            if self._stream is not None:
                self._stream.close()
            self._stream = (self._directory / f"__0_{self._files}.distcp").open("wb")
            self._files += 1
        start = self._stream.tell()
        torch.save(value, self._stream)
        return Span(Path(self._stream.name).name, start, self._stream.tell() - start)


class BlockReader:
    """Reads blocks of a payload's tensors."""

    def __init__(self, path: Path, index: PayloadIndex) -> None:
        self._path, self._index = path, index
        self._readers: dict[str, TensorReader] = {}

    def block(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The block of tensor ``name`` that begins at ``offsets``, of the shape ``sizes``, on the CPU.

        Raises:
            CheckpointError: it is not there, in part or at all, or its bytes are damaged.
        """
        if name not in self._index.tensors:
            raise CheckpointError(f"{self._path} has no tensor {name!r}; mslm checkpoint inspect lists them")
        stored = self._index.tensors[name]
        if name not in self._readers:
            self._readers[name] = TensorReader(self._path, name, stored)
        found = torch.empty(tuple(sizes), dtype=getattr(torch, stored.dtype))
        into = found.view(-1).view(torch.uint8).numpy().data
        self._readers[name].read(Block(tuple(offsets), tuple(sizes)), into)
        return found
