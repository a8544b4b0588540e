"""Initial weights as a pure function of (seed, global name, global index).

Core draws them from a generator that is offset by tp and pp rank, so two layouts start from different models. Here each
element has an address in core's sharded-tensor identity (key and global offset, the one checkpoints use), and its value
is read from a counter-based stream at that address: TP1, TP2, PP2, VPP2 and DP2 start from the same global weights.
Streams: Philox-4x64-10 (Salmon et al., SC'11), keyed by BLAKE2b of seed and name; normals by inverse error function.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

DRAWS_PER_COUNT = 4  # Philox-4x64 yields four 64-bit words per counter value


def initialise(chunks: list[Any], seed: int, standard_deviation: Callable[[str], float | None]) -> None:
    """Write every parameter of the rank's model chunks in place.

    Args:
        chunks: modules with core's ``sharded_state_dict``.
        seed: the run's seed.
        standard_deviation: of a parameter by its global name; None marks a parameter that its module has already set
            (norm weights to one, biases to zero).
    """
    for shard in shards(chunks):
        deviation = standard_deviation(shard.key)
        if deviation is not None and not isinstance(shard.data, FakeTensor):  # which has no values to write
            with torch.no_grad():
                shard.data.copy_(normal_shard(shard, seed).mul_(deviation).view_as(shard.data))


def normal_shard(shard: ShardedTensor, seed: int) -> Tensor:
    """Standard-normal values of one shard, float64 on the host, shape [*stacked axes as 1, *local shape]."""
    rows, columns = shard.local_shape[0], math.prod(shard.local_shape[1:])
    stacked = shard.global_offset[: shard.prepend_axis_num]
    first_row = shard.global_offset[shard.prepend_axis_num]
    column_offsets = shard.global_offset[shard.prepend_axis_num + 1 :]
    global_columns = math.prod(shard.global_shape[shard.prepend_axis_num + 1 :])
    stream = _stream_key(seed, shard.key, stacked)
    if columns == global_columns:
        uniform = _uniform(stream, first_row * global_columns, rows * columns).reshape(rows, columns)
    else:
        first = column_offsets[0]
        uniform = np.stack(
            [_uniform(stream, (first_row + row) * global_columns + first, columns) for row in range(rows)]
        )
    # erfinv maps the open interval (-1, 1); 2u - 1 with u in [2^-53, 1 - 2^-53] never reaches its ends.
    return torch.erfinv(torch.from_numpy(uniform).mul_(2.0).sub_(1.0)).mul_(math.sqrt(2.0))


def shards(chunks: list[Any]) -> Iterator[ShardedTensor]:
    """Every parameter of the chunks under its global identity; ``data`` is (a view of) the parameter itself."""
    for chunk in chunks:
        state = chunk.sharded_state_dict()
        for value in state.values():
            yield from _leaves(value)


def _leaves(value: Any) -> Iterator[ShardedTensor]:
    """Sharded tensors of one entry; a factory (gated MLP: gate and up halves) is asked for its parts."""
    if isinstance(value, ShardedTensorFactory):
        value = value.build()
    if isinstance(value, ShardedTensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)


def _stream_key(seed: int, name: str, stacked: tuple[int, ...]) -> int:
    """128-bit key of a tensor's stream; ``stacked`` are its coordinates on prepended axes (the layer number)."""
    text = f"{seed}\0{name}\0{','.join(map(str, stacked))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def _uniform(key: int, start: int, count: int) -> np.ndarray:
    """``count`` numbers of (0, 1) at positions ``start``... of the stream, float64."""
    skipped = start % DRAWS_PER_COUNT
    bits = np.random.Philox(key=key, counter=start // DRAWS_PER_COUNT).random_raw(skipped + count)[skipped:]
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
