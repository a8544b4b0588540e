"""Exact products of rows of bytes with a small matrix of bytes: how tensors become digests (``replay/fingerprint.py``).

Shapes: R rows, W bytes of a row (at most 1,024), C columns of the key. A sum of W products of two signed bytes stays
within 2^24, so int32 holds it, and so does float32: every order of additions gives the same bits. That is why a matrix
unit may do it, on any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor], object]
WIDEST_ROW = 1024
FEWEST_ROWS = 32
"""cuBLASLt refuses 16 rows and fewer."""
_CPU_ROWS = 384
"""Rows that fit the cache of a core beside what oneDNN packs of them; a multiple of the 48 that it takes at once."""
_FLOAT_ROWS = 512
"""Rows turned into float32 at once: 2 MiB, which stay in the cache."""


def row_products(rows: Tensor, key: Tensor, out: Tensor) -> None:
    """Write ``rows @ key`` into ``out``, exactly, on their device.

    Args:
        rows: [R, W] int8, contiguous; W is a multiple of 8 and at most ``WIDEST_ROW``.
        key: [W, C] int8; C is a multiple of 8.
        out: [R, C] int32, contiguous.
    """
    choose(rows.device.type)[0](rows, key, out)


@cache
def choose(device: str) -> tuple[Product, str]:
    """The product for a kind of device, and why it is that one.

    Integer matrix units are fastest, but not every CPU sums bytes exactly: without VNNI instructions oneDNN adds pairs
    of products in 16 bits, where they saturate. So they are tried on the largest sums there are.
    """
    try:
        exact = _is_exact(_integer, device)
    except (RuntimeError, NotImplementedError):
        exact = False
    if exact:
        return _integer, "int8 matrix product of torch (oneDNN on a CPU, cuBLASLt on a GPU): exact when tried"
    return _float, "float32 matrix product: this machine's int8 product is missing or saturates"


def reference(rows: Tensor, key: Tensor) -> Tensor:
    """The specification: [R, C] int32, summed in 64 bits."""
    return (rows.to(torch.int64).unsqueeze(-1) * key.to(torch.int64)).sum(dim=1).to(torch.int32)


def _integer(rows: Tensor, key: Tensor, out: Tensor) -> None:
    if rows.is_cuda and rows.shape[0] < FEWEST_ROWS:
        padded = rows.new_zeros(FEWEST_ROWS, rows.shape[1])
        padded[: rows.shape[0]] = rows
        out.copy_(torch._int_mm(padded, key)[: rows.shape[0]])
        return
    if rows.is_cuda:
        # cuBLASLt wants its operands aligned; a part of a buffer may begin anywhere.
        torch._int_mm(rows if rows.data_ptr() % 16 == 0 else rows.clone(), key, out=out)
        return
    turned = key.t()
    product = out.new_empty(key.shape[1], _CPU_ROWS)
    words = rows.view(torch.int64) if rows.storage_offset() % 8 == 0 else None
    for start in range(0, rows.shape[0], _CPU_ROWS):
        stop = min(start + _CPU_ROWS, rows.shape[0])
        if words is not None:
            # oneDNN reads many rows side by side, which the prefetcher does not follow: a sum brings them in faster.
            words[start:stop].sum()
        if stop - start == _CPU_ROWS:
            # Rows in the place of columns fill its vectors; the key has too few to.
            torch._int_mm(turned, rows[start:stop].t(), out=product)
            out[start:stop] = product.t()
        else:
            torch._int_mm(rows[start:stop], key, out=out[start:stop])


def _float(rows: Tensor, key: Tensor, out: Tensor) -> None:
    as_float = key.to(torch.float32)
    for part, result in zip(rows.split(_FLOAT_ROWS), out.split(_FLOAT_ROWS), strict=True):
        result.copy_(part.to(torch.float32) @ as_float)


def _is_exact(product: Product, device: str) -> bool:
    """On rows and keys of extreme values, in every combination of signs, and on made-up ones."""
    ramp = torch.arange(FEWEST_ROWS * WIDEST_ROW, device=device).mul(2_654_435_761).bitwise_right_shift(7)
    rows = ramp.to(torch.int8).view(FEWEST_ROWS, WIDEST_ROW)
    rows[0], rows[1], rows[2, ::2], rows[2, 1::2] = 127, -128, -128, 127
    key = rows[:8].t().contiguous()
    out = torch.empty(FEWEST_ROWS, 8, dtype=torch.int32, device=device)
    product(rows, key, out)
    return bool(torch.equal(out, reference(rows, key)))
