"""Any block of a stored tensor, read from the pieces it lies in, whatever ranks have cut them. No torch.

A piece is what ``torch.save`` has written: a zip archive, nothing compressed, in which ``data.pkl`` says how the tensor
lies in the record ``data/0``. So bytes are read from where they are, without loading the piece. The pickle is read as
``payload_index`` reads one: what is not the description of a tensor is refused, and nothing in it is called.
"""

from __future__ import annotations

import collections
import io
import itertools
import math
import os
import pickle
import zipfile
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_slm.errors import CheckpointError
from megatron_slm.train.manifest import regular_size
from megatron_slm.train.payload_index import DTYPE_BYTES, Chunk, Span, StoredTensor

LOCAL_HEADER = 30
"""Bytes of a zip archive's local header, before the name and the extra field."""


class Block(NamedTuple):
    """A box of a tensor: where it begins on every axis, and its shape."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Elements in it."""
        return math.prod(self.sizes)


class TensorReader:
    """Reads blocks of one stored tensor. Holds nothing of its data.

    Args:
        path: of the checkpoint.
        name: of the tensor, for messages.
    """

    def __init__(self, path: Path, name: str, stored: StoredTensor) -> None:
        self._path, self._name = path, name
        self._bytes = DTYPE_BYTES[stored.dtype]
        self._chunks = sorted(stored.chunks)
        self._starts = [chunk.offsets[:1] for chunk in self._chunks]
        self._longest = max((chunk.sizes[0] for chunk in self._chunks if chunk.sizes), default=0)
        self._data: dict[Span, int] = {}

    def read(self, block: Block, into: memoryview) -> None:
        """Fill ``into`` with a block's elements in row-major order.

        Args:
            into: as many bytes as the block has.

        Raises:
            CheckpointError: a piece is damaged or refused, or the pieces leave a part of the block out.
        """
        found = 0
        for chunk in self._near(block):
            common = intersection(block, Block(chunk.offsets, chunk.sizes))
            if common is not None:
                self._copy(chunk, common, block, into)
                found += common.num_elements
        if found != block.num_elements:
            raise CheckpointError(
                f"{self._path}: the pieces of {self._name} do not cover it ({found} of {block.num_elements} elements "
                f"at {block.offsets}); choose another checkpoint"
            )

    def _near(self, block: Block) -> list[Chunk]:
        """The pieces that can meet a block: those that begin in or shortly before it on the first axis."""
        if not block.sizes:
            return self._chunks
        first, end = block.offsets[0], block.offsets[0] + block.sizes[0]
        low, high = (bisect_left(self._starts, (bound,)) for bound in (first - self._longest + 1, end))
        return self._chunks[low:high]

    def _copy(self, chunk: Chunk, common: Block, block: Block, into: memoryview) -> None:
        size = self._bytes
        file = self._path / chunk.span.file
        data = self._data_start(chunk)
        try:
            with file.open("rb", buffering=0) as stream:
                for source, target, count in runs(common, Block(chunk.offsets, chunk.sizes), block):
                    _read_at(stream.fileno(), data + source * size, into[target * size : (target + count) * size])
        except (OSError, EOFError) as error:
            raise CheckpointError(
                f"{file} cannot be read at {self._name} ({error}); choose another checkpoint"
            ) from error

    def _data_start(self, chunk: Chunk) -> int:
        """Where in its file the elements of a piece begin."""
        if chunk.span not in self._data:
            try:
                self._data[chunk.span] = _find_data(self._path / chunk.span.file, chunk, self._bytes)
            except CheckpointError as error:
                raise CheckpointError(f"{self._path / chunk.span.file} is refused at {self._name}: {error}") from error
            except Exception as error:  # a damaged archive or pickle raises nearly anything
                raise CheckpointError(
                    f"{self._path / chunk.span.file} is damaged at {self._name} ({error!r}); choose another checkpoint"
                ) from error
        return self._data[chunk.span]


def intersection(first: Block, second: Block) -> Block | None:
    """What two blocks of one tensor have in common; None where that is nothing."""
    begins = tuple(map(max, first.offsets, second.offsets))
    ends = (
        min(a + m, b + n) for a, m, b, n in zip(first.offsets, first.sizes, second.offsets, second.sizes, strict=True)
    )
    sizes = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
    return Block(begins, sizes) if all(size > 0 for size in sizes) else None


def runs(common: Block, source: Block, target: Block) -> Iterator[tuple[int, int, int]]:
    """What of ``common`` lies without a gap in both blocks: (first element in source, in target, elements)."""
    axes = len(common.sizes)
    whole = axes  # axes from here on are the whole of both blocks
    while whole and common.sizes[whole - 1] == source.sizes[whole - 1] == target.sizes[whole - 1]:
        whole -= 1
    outer = max(whole - 1, 0)
    count = math.prod(common.sizes[outer:])
    strides = [_strides(block.sizes) for block in (source, target)]
    bases = [
        sum((c - b) * s for c, b, s in zip(common.offsets, block.offsets, stride, strict=True))
        for block, stride in zip((source, target), strides, strict=True)
    ]
    for position in itertools.product(*(range(size) for size in common.sizes[:outer])):
        first, second = (
            base + sum(p * s for p, s in zip(position, stride[:outer], strict=True))
            for base, stride in zip(bases, strides, strict=True)
        )
        yield first, second, count


def _strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Elements from one position to the next on every axis, row-major."""
    return tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))


def _read_at(descriptor: int, position: int, into: memoryview) -> None:
    """Fill ``into`` from a position of a file.

    Raises:
        EOFError: the file ends before.
    """
    while into:  # Linux reads at most 2 GiB at once
        count = os.preadv(descriptor, [into], position)
        if count == 0:
            raise EOFError("it ends too early")
        position, into = position + count, into[count:]


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: Path, span: Span) -> None:
        super().__init__()
        regular_size(file)
        self._stream = file.open("rb")
        self._span, self._position = span, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._span.length}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(min(len(buffer), self._span.length - self._position), 0)
        self._stream.seek(self._span.start + self._position)
        found = self._stream.read(wanted)
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Stored(NamedTuple):
    """How ``data.pkl`` describes a tensor."""

    record: str
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Reads the description of one tensor; nothing is imported and nothing of a stranger's called."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return lambda record, offset, sizes, strides, *rest: _Stored(record, offset, sizes, strides)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module in ("torch", "torch.storage") and (name.endswith("Storage") or name in DTYPE_BYTES):
            return name
        raise CheckpointError(
            f"it names {module}.{name}, which no tensor needs; use a checkpoint from a source you trust"
        )

    def persistent_load(self, pid: Any) -> str:
        return str(pid[2])


def _find_data(file: Path, chunk: Chunk, element_bytes: int) -> int:
    """Where in ``file`` the elements of a piece begin, row-major and without gaps.

    Raises:
        CheckpointError: they do not lie so, or are not those that the index promises.
    """
    with _Window(file, chunk.span) as window, zipfile.ZipFile(window) as archive:
        root = archive.namelist()[0].partition("/")[0]
        stored = _Unpickler(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()
        if not isinstance(stored, _Stored):
            raise CheckpointError("it holds no tensor")
        record = archive.getinfo(f"{root}/data/{stored.record}")
        expected = _strides(chunk.sizes)
        # An axis of one element may have any stride.
        dense = all(size < 2 or a == b for size, a, b in zip(chunk.sizes, stored.strides, expected, strict=True))
        if tuple(stored.sizes) != chunk.sizes or not dense or record.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError("it is not the tensor that the index promises, row by row and uncompressed")
        if f"{root}/byteorder" in archive.namelist() and archive.read(f"{root}/byteorder") != b"little":
            raise CheckpointError("it was written by a big-endian machine")
        end = stored.offset * element_bytes + math.prod(chunk.sizes) * element_bytes
        if end > record.file_size:
            raise CheckpointError("it is shorter than the index promises")
        window.seek(record.header_offset)
        header = window.read(LOCAL_HEADER) or b""
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return chunk.span.start + record.header_offset + LOCAL_HEADER + names + stored.offset * element_bytes
