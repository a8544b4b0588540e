"""A hash of a checkpoint's tensors that does not depend on how ranks have cut them. No torch.

    tensor   blake2b (256 bits) of its bytes in row-major order over the whole tensor, little-endian
    global   blake2b of a line "NAME DTYPE SHAPE HASH" for each tensor, in the order of names

Two checkpoints with one global hash hold the same tensors, bit for bit, under whatever layouts they were saved. Random
states and other objects are not in it: they belong to ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_slm.train.payload_blocks import Block, TensorReader
from megatron_slm.train.payload_index import DTYPE_BYTES, PayloadIndex, StoredTensor, is_weight, read_index

BLOCK_BYTES = 1 << 20
"""Read at once, in each thread."""
THREADS = 4
DIGEST_BYTES = 32


def tensor_hashes(path: Path, index: PayloadIndex | None = None, *, weights_only: bool = False) -> dict[str, str]:
    """Name -> "DTYPE SHAPE HASH" of every tensor of the checkpoint in ``path``, in the order of names.

    Memory: ``THREADS`` blocks of ``BLOCK_BYTES``, however large a tensor is.

    Raises:
        CheckpointError: something of it is damaged.
    """
    tensors = (read_index(path) if index is None else index).tensors
    names = sorted(name for name in tensors if is_weight(name) or not weights_only)
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        lines = list(pool.map(lambda name: _line(path, name, tensors[name]), names))
    return dict(zip(names, lines, strict=True))


def combined(hashes: Mapping[str, str]) -> str:
    """The global hash of what ``tensor_hashes`` returned."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, line in hashes.items():
        digest.update(f"{name} {line}\n".encode())
    return digest.hexdigest()


def differing(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    """A line for every tensor that two checkpoints do not have alike, in the order of names."""
    found = []
    for name in sorted({*first, *second}):
        here, there = first.get(name), second.get(name)
        if here is None or there is None:
            found.append(f"{name}: only in the {'second' if here is None else 'first'}")
        elif here != there:
            kinds = [line.rpartition(" ")[0] for line in (here, there)]
            found.append(f"{name}: " + (f"{kinds[0]} and {kinds[1]}" if kinds[0] != kinds[1] else "other values"))
    return found


def row_blocks(shape: tuple[int, ...], limit: int) -> Iterator[Block]:
    """Blocks of at most ``limit`` elements that, one after the other, are a tensor in row-major order."""
    if math.prod(shape) <= limit or not shape:
        if 0 not in shape:
            yield Block((0,) * len(shape), shape)
        return
    row = math.prod(shape[1:])
    if row <= limit:
        rows = limit // row
        for start in range(0, shape[0], rows):
            yield Block((start, *(0 for _ in shape[1:])), (min(rows, shape[0] - start), *shape[1:]))
        return
    for start in range(shape[0]):
        for inner in row_blocks(shape[1:], limit):
            yield Block((start, *inner.offsets), (1, *inner.sizes))


def _line(path: Path, name: str, stored: StoredTensor) -> str:
    """Dtype, shape and hash of one tensor."""
    size = DTYPE_BYTES[stored.dtype]
    limit = max(BLOCK_BYTES // size, 1)
    buffer = memoryview(bytearray(min(limit * size, stored.num_bytes)))
    reader, digest = TensorReader(path, name, stored), hashlib.blake2b(digest_size=DIGEST_BYTES)
    for block in row_blocks(stored.shape, limit):
        part = buffer[: block.num_elements * size]
        reader.read(block, part)
        digest.update(part)
    return f"{stored.dtype} {'x'.join(map(str, stored.shape)) or 'scalar'} {digest.hexdigest()}"
