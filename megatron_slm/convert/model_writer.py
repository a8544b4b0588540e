"""Writes the weights of a Hugging Face directory as sharded safetensors, one tensor at a time.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, first
and last byte) and the tensors. Their places are known before the first is written, so they may come in any order. The
bytes are those of ``safetensors.torch.save_file``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from megatron_slm.convert.model_files import DTYPES, INDEX, SINGLE
from megatron_slm.train.payload_index import DTYPE_BYTES

HEADER_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}


class Declared(NamedTuple):
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        count = DTYPE_BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


class ModelWriter:
    """Safetensors files in ``directory`` for the declared tensors, each to be given to ``write`` once.

    Args:
        tensors: in the order in which they are divided over files.
        max_shard_bytes: of the tensors of one file; a larger tensor has a file of its own.
    """

    def __init__(self, directory: Path, tensors: Sequence[Declared], max_shard_bytes: int) -> None:
        self._directory = directory
        self._shards = _divided(tensors, max_shard_bytes)
        self._places: dict[str, tuple[Path, int, Declared]] = {}
        self._streams: dict[Path, IO[bytes]] = {}
        for file, inside in zip(self.file_names, self._shards, strict=True):
            self._begin(directory / file, inside)
        self._missing = set(self._places)

    @property
    def file_names(self) -> list[str]:
        """Names of the files, in order."""
        count = len(self._shards)
        return [SINGLE] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, of the shape and dtype that were declared.

        Raises:
            OSError: the disk takes no more.
        """
        file, start, declared = self._places[name]
        found = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        assert found == (declared.shape, declared.dtype), f"{name} is {found}, declared as {declared}"
        stream = self._streams[file]
        stream.seek(start)
        stream.write(tensor.contiguous().view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def close(self) -> None:
        """Wait until the files are on the disk, and write the index if there are several."""
        assert not self._missing, f"{min(self._missing)} was declared and not written"
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        if len(self._shards) > 1:
            total = sum(declared.num_bytes for inside in self._shards for declared in inside)
            places = {name: file.name for name, (file, _, _) in sorted(self._places.items())}
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)
            (self._directory / INDEX).write_text(text + "\n", encoding="utf-8")

    def _begin(self, file: Path, inside: Sequence[Declared]) -> None:
        """The header of one file, which is given its whole length."""
        ordered = sorted(inside, key=lambda declared: (-DTYPE_BYTES[declared.dtype], declared.name))
        header, offset = _header(ordered), 0
        stream = file.open("wb")
        self._streams[file] = stream
        stream.write(len(header).to_bytes(8, "little") + header)
        for declared in ordered:
            self._places[declared.name] = (file, 8 + len(header) + offset, declared)
            offset += declared.num_bytes
        stream.truncate(8 + len(header) + offset)


def _divided(tensors: Sequence[Declared], max_shard_bytes: int) -> list[list[Declared]]:
    """Files full of consecutive tensors."""
    shards: list[list[Declared]] = [[]]
    size = 0
    for declared in tensors:
        if shards[-1] and size + declared.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(declared)
        size += declared.num_bytes
    return shards


def _header(ordered: Sequence[Declared]) -> bytes:
    entries: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for declared in ordered:
        end = offset + declared.num_bytes
        entries[declared.name] = {
            "dtype": HEADER_NAMES[declared.dtype],
            "shape": list(declared.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)
