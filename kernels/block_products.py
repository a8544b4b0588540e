"""Blocks of 32 KiB to 32 bytes each, in one pass over memory: both levels of a fingerprint (``replay/fingerprint.py``).

A block is 32 rows of 1,024 bytes, with zeros behind the end of its tensor. Its rows times the first key are 32 x 8
int32, which as 1,024 bytes are the one row that is multiplied by the second key. All sums are exact in int32, so every
order of additions gives the same bits, and so do ``row_products`` twice over.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

ROW_BYTES, ROWS, COLUMNS = 1024, 32, 8
BLOCK_BYTES = ROW_BYTES * ROWS


@cache
def choose(device: str) -> tuple[bool, str]:
    """Whether a kind of device makes both levels in one pass, and why."""
    if device != "cuda":
        return False, "the Triton kernel is for CUDA: elsewhere two products of torch's"
    if find_spec("triton") is None:
        return False, "triton is not installed (pip install triton): two products of torch's, and memory between them"
    try:
        exact = _is_exact(torch.device(device))
    except Exception as error:  # triton raises what its compiler, the driver or the system raise
        return False, f"the Triton kernel cannot be built here ({type(error).__name__}): two products of torch's"
    if not exact:
        return False, "this machine's Triton kernel gave other bits than the reference when tried"
    return True, "Triton kernel: exact when tried"


def block_products(data: Sequence[Tensor], first: Tensor, second: Tensor) -> Tensor:
    """[blocks of all tensors, COLUMNS] int32, by the Triton kernel.

    Args:
        data: [bytes] int8, contiguous, of one device: each begins a block.
        first, second: [ROW_BYTES, COLUMNS] int8, the keys.
    """
    from megatron_slm.kernels import block_products_triton

    return block_products_triton.launch(data, first, second)


def reference(data: Sequence[Tensor], first: Tensor, second: Tensor) -> Tensor:
    """The specification: the same, summed in 64 bits."""
    padded = [torch.nn.functional.pad(part, (0, -len(part) % BLOCK_BYTES)) for part in data]
    rows = torch.cat(padded).view(-1, ROW_BYTES, 1).to(torch.int64)
    products = (rows * first.to(torch.int64)).sum(dim=1).to(torch.int32)
    rows = products.view(-1).view(torch.int8).view(-1, ROW_BYTES, 1).to(torch.int64)
    return (rows * second.to(torch.int64)).sum(dim=1).to(torch.int32)


def trial(device: torch.device) -> tuple[list[Tensor], Tensor, Tensor]:
    """Data and keys that reach the largest sums there are, whole and torn blocks, and starts that are not aligned."""
    ramp = torch.arange(3 * BLOCK_BYTES + 77, device=device).mul(2_654_435_761).bitwise_right_shift(7).to(torch.int8)
    extreme = torch.full((BLOCK_BYTES,), -128, dtype=torch.int8, device=device)
    extreme[ROW_BYTES : 2 * ROW_BYTES] = 127
    first = ramp[: ROW_BYTES * COLUMNS].view(ROW_BYTES, COLUMNS).clone()
    first[:, 0], first[:, 1] = -128, 127
    second = first.flip(1).contiguous()
    return [ramp, extreme, ramp[3:], ramp[:0], ramp[5:6], ramp[16 : 16 + 2 * BLOCK_BYTES]], first, second


def _is_exact(device: torch.device) -> bool:
    data, first, second = trial(device)
    return bool(torch.equal(block_products(data, first, second), reference(data, first, second)))
