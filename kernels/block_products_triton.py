"""The Triton kernel of ``block_products``. Importing this file needs triton.

R rows of the blocks of one program, C columns of a key, padded to the fewest that a matrix unit takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

ROW_BYTES, ROWS, COLUMNS = 1024, 32, 8
BLOCK_BYTES = ROW_BYTES * ROWS
PADDED = 16
BLOCKS = 4
"""Of one program: the first key is read once for all of them."""
STEP = 128
"""Bytes of a row that are multiplied at once."""
ALIGNED = 16
"""Bytes that a thread loads at once."""


def launch(data: Sequence[Tensor], first: Tensor, second: Tensor) -> Tensor:
    """See :func:`block_products.block_products`."""
    device = first.device
    sizes = np.array([len(part) for part in data], dtype=np.int64)
    counts = -(-sizes // BLOCK_BYTES)
    owner = np.repeat(np.arange(len(sizes)), counts)
    at = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * BLOCK_BYTES
    starts = np.array([part.data_ptr() for part in data], dtype=np.int64)[owner] + at
    lengths = sizes[owner] - at
    out = torch.empty(len(owner), COLUMNS, dtype=torch.int32, device=device)
    keys = _padded(first, second)
    whole = (lengths >= BLOCK_BYTES) & (starts % ALIGNED == 0)
    for chosen, is_whole in ((np.flatnonzero(whole), True), (np.flatnonzero(~whole), False)):
        if not len(chosen):
            continue
        programs = -(-len(chosen) // BLOCKS)
        chosen = np.resize(chosen, programs * BLOCKS)  # the last program makes some blocks once more
        table = torch.from_numpy(np.stack([starts[chosen], lengths[chosen], chosen])).to(device)
        _products[(programs,)](
            *table, *keys, out, BLOCKS, ROWS, ROW_BYTES, COLUMNS, PADDED, STEP, ALIGNED, is_whole
        )  # fmt: skip
    return out


@cache
def _padded(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The keys as the kernel reads them: [ROW_BYTES, PADDED], and [COLUMNS, bytes of an int32, ROWS, PADDED]."""
    by_byte = second.view(ROWS, COLUMNS, 4, COLUMNS).permute(3, 2, 0, 1)
    wide, deep = (torch.nn.functional.pad(key, (0, PADDED - COLUMNS)) for key in (first, by_byte))
    return wide.contiguous(), deep.contiguous()


@triton.jit
def _products(  # type: ignore[no-untyped-def]  # Triton looks annotations up, and refuses all but its own
    starts, lengths, places, first, second, out,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, ROW_BYTES: tl.constexpr, COLUMNS: tl.constexpr,
    PADDED: tl.constexpr, STEP: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCKS * ROWS)
    block = tl.program_id(0) * BLOCKS + row // ROWS
    at = (row % ROWS) * ROW_BYTES
    data = (tl.load(starts + block) + at).to(tl.pointer_type(tl.int8))
    left = tl.load(lengths + block) - at
    if WHOLE:
        data = tl.multiple_of(data, ALIGNED)
    column = tl.arange(0, PADDED)
    product = tl.zeros([BLOCKS * ROWS, PADDED], dtype=tl.int32)
    for begin in range(0, ROW_BYTES, STEP):
        byte = begin + tl.arange(0, STEP)
        if WHOLE:
            values = tl.load(data[:, None] + byte[None, :])
        else:
            values = tl.load(data[:, None] + byte[None, :], mask=byte[None, :] < left[:, None], other=0)
        key = tl.load(first + byte[:, None] * PADDED + column[None, :])
        product = tl.dot(values, key, product, out_dtype=tl.int32)
    place = tl.load(places + tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS))
    for found in tl.static_range(COLUMNS):
        total = tl.zeros([BLOCKS * ROWS], dtype=tl.int32)
        for number in tl.static_range(4):
            byte_of = (product << (24 - 8 * number)) >> 24
            at_key = ((found * 4 + number) * ROWS + row % ROWS) * PADDED
            key = tl.load(second + at_key[:, None] + column[None, :]).to(tl.int32)
            total += tl.sum(byte_of * key, axis=1)
        tl.store(out + place * COLUMNS + found, tl.sum(tl.reshape(total, [BLOCKS, ROWS]), axis=1))
