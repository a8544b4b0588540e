"""How long kernels and exchanges take on this machine. Runs on every rank of a started job."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_slm.parallel.device import synchronize

ENOUGH_SECONDS, FEWEST, MOST = 0.15, 5, 200
"""A measurement is repeated until it has taken so long in all, within these numbers of times."""

SIDES = {"cuda": (512, 1024, 2048, 4096, 8192), "cpu": (64, 128, 256, 512, 1024)}
"""Of the matrix products: square ones, and products with one short side."""

STREAM_BYTES = {"cuda": (1 << 26, 1 << 28, 1 << 30), "cpu": (1 << 22, 1 << 24, 1 << 26)}
MESSAGE_BYTES = {
    "cuda": tuple(1 << size for size in range(12, 29, 4)),
    "cpu": tuple(1 << size for size in range(10, 25, 3)),
}
ATTENTION = {"cuda": (2048, 32, 128), "cpu": (256, 4, 64)}
"""Sequence, heads and head dimension."""

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


@dataclass(frozen=True)
class Sample:
    """One thing that was measured.

    Attributes:
        kind: "gemm", "attention", "streaming", "op", or a collective.
        sizes: m, n, k of a product; sequence, heads and head dimension of attention; bytes otherwise.
        seconds: of every repetition.
        ranks, in_node: of the group of a collective, as in ``plan.links.Span``.
    """

    kind: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    ranks: int = 1
    in_node: int = 1

    @property
    def median(self) -> float:
        """Of the repetitions."""
        ordered = sorted(self.seconds)
        return ordered[len(ordered) // 2]


def kernels(device: str) -> Iterator[Sample]:
    """Matrix products in bf16, attention, element-wise kernels, and the start of one. No communication."""
    place = torch.device(device)
    for m, n, k in shapes(SIDES[device]):
        left, right = (torch.randn(size, dtype=torch.bfloat16, device=place) for size in ((m, k), (k, n)))
        yield Sample("gemm", (m, n, k), repeated(partial(torch.matmul, left, right), device))
    length, heads, channels = ATTENTION[device]
    queries, keys, values = (
        torch.randn(1, heads, length, channels, dtype=torch.bfloat16, device=place) for _ in range(3)
    )
    attention = partial(F.scaled_dot_product_attention, queries, keys, values, is_causal=True)
    yield Sample("attention", (length, heads, channels), repeated(attention, device))
    for size in STREAM_BYTES[device]:
        # Reads one half and writes the other.
        source = torch.zeros(size // 8, dtype=torch.float32, device=place)
        target = torch.empty_like(source)
        yield Sample("streaming", (size,), repeated(partial(target.copy_, source), device))
    small = torch.zeros(16, device=place)
    yield Sample("op", (64,), repeated(lambda: [small.add_(1.0) for _ in range(100)], device, parts=100))


def shapes(sides: Sequence[int]) -> list[tuple[int, int, int]]:
    """Square products, and those with one side of the smallest."""
    small, large = sides[0], sides[-1]
    return [
        *((side, side, side) for side in sides),
        (small, large, large),
        (large, small, large),
        (large, large, small),
    ]


def exchanges(device: str, groups: Sequence[tuple[Any, int, int]]) -> Iterator[Sample]:
    """Collectives of every size over every group. Every rank calls this.

    Args:
        groups: (process group, its ranks, those of them in this node).
    """
    for group, ranks, in_node in groups:
        for collective in COLLECTIVES:
            for size in MESSAGE_BYTES[device]:
                work = exchange(collective, size // ranks * ranks, group, ranks, torch.device(device))
                seconds = repeated(work, device, group=group)
                yield Sample(collective, (size // ranks * ranks,), seconds, ranks, in_node)


def exchange(collective: str, size: int, group: Any, ranks: int, device: torch.device) -> Callable[[], Any]:
    """One collective of ``size`` bytes: S of ``plan.links.volume``."""
    whole = torch.zeros(max(ranks, size // 4 // ranks * ranks), dtype=torch.float32, device=device)
    part = torch.zeros(whole.numel() // ranks, dtype=torch.float32, device=device)
    if collective == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group)
    if collective == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part, group=group)
    if collective == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole, group=group)
    target = torch.empty_like(whole)
    return lambda: dist.all_to_all_single(target, whole, group=group)


def repeated(work: Callable[[], Any], device: str, *, group: Any = None, parts: int = 1) -> tuple[float, ...]:
    """Seconds of every repetition; with a group all ranks repeat equally often, and the slowest rank counts.

    Args:
        parts: equal pieces that one call of ``work`` consists of; one of them is returned.
    """
    for _ in range(2):
        work()
    first = _timed(work, device, group)
    times = min(MOST, max(FEWEST, math.ceil(ENOUGH_SECONDS / max(first, 1e-6))))
    if group is not None:
        times = int(_largest(times, device, group))
    found = [_timed(work, device, group) / parts for _ in range(times)]
    if group is None:
        return tuple(found)
    values = torch.tensor(found, dtype=torch.float64, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return tuple(values.tolist())


def _timed(work: Callable[[], Any], device: str, group: Any) -> float:
    if group is not None:
        dist.barrier(group=group)
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def _largest(value: float, device: str, group: Any) -> float:
    found = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return float(found.item())
